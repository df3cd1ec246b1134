"""Processors that scale an image to a grid of patches: Qwen2-VL to Qwen3.5 and GLM-4V."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.image_utils import SizeDict
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.vision.files import UNREADABLE, load_image
from megatron_gkd.data.vision.image import Image, Video
from megatron_gkd.data.vision.processor import PixelLimits, find_reserved_ids, open_image_processor, read_config
from megatron_gkd.data.vision.video_processing import VideoProcessing, has_videos
from megatron_gkd.errors import UserError


@dataclass(eq=False)
class GridProcessing:
    """What such a processor makes of images. It is pickled into worker processes without what it has opened.

    Attributes:
        folder: of the checkpoint.
        limits: sizes to which images are scaled.
    """

    folder: Path
    limits: PixelLimits

    @property
    def placeholder_id(self) -> int:
        """The token that stands for an image in a rendered row; it is repeated as often as the grid says."""
        return self._config.image_token_id

    @cached_property
    def videos(self) -> VideoProcessing | None:
        """What the processor makes of videos; None where they are not supported."""
        return VideoProcessing(self.folder, self._config) if has_videos(self._config) else None

    @cached_property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that no text of a row has, and that are never sampled."""
        return tuple(sorted(find_reserved_ids(self._config)))

    @cached_property
    def position_rows(self) -> int:
        """3 with multimodal rotary embeddings, otherwise 1."""
        return 3 if self._rope is not None else 1

    @property
    def settings(self) -> dict[str, Any]:
        """All that the tokens and pixels of an image depend on, as JSON values."""
        settings = {"image_processor": self._images.to_dict(), "placeholder_id": self.placeholder_id}
        return settings if self.videos is None else settings | {"videos": self.videos.settings}

    def tokens(self, image: Image) -> list[int]:
        """Return the ids that replace the placeholder of an image or a video."""
        if isinstance(image, Video):
            return self._require_videos(image).tokens(image)
        height, width = self._grid(image)
        return [self.placeholder_id] * (height * width // self._images.merge_size**2)

    def num_patches(self, image: Image) -> int:
        """Return the number of patches that the vision tower computes."""
        if isinstance(image, Video):
            return math.prod(self._require_videos(image).grid(image))
        height, width = self._grid(image)
        return height * width

    def positions(self, input_ids: np.ndarray, images: Sequence[Image]) -> np.ndarray:
        """Return the positions of a whole sequence without padding, int64 [position_rows, L]."""
        if self._rope is None or not images:
            return np.tile(np.arange(len(input_ids), dtype=np.int64), (self.position_rows, 1))
        ids = torch.from_numpy(np.asarray(input_ids, dtype=np.int64)).unsqueeze(0)
        types = (ids == self.placeholder_id).int()
        pictures, videos = _split(images)
        options: dict[str, Any] = {}
        if pictures:
            options["image_grid_thw"] = torch.tensor([[1, *self._grid(image)] for image in pictures])
        if videos:
            processing = self._require_videos(videos[0])
            types += 2 * (ids == processing.placeholder_id).int()
            options["video_grid_thw"] = torch.tensor([processing.grid(video) for video in videos])
        positions, _ = self._rope.get_rope_index(input_ids=ids, mm_token_type_ids=types, **options)
        if videos:
            self._require_videos(videos[0]).set_times(positions, types == 2, videos)
        return positions.squeeze(1).numpy()

    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Decode images and return `pixel_values` and `image_grid_thw`, and those of videos.

        Raises:
            UserError: an image cannot be read, or is not the one that was tokenized.
        """
        pictures, videos = _split(images)
        found = self._pixels_of_images(pictures) if pictures else {}
        return found | self._require_videos(videos[0]).pixels(videos) if videos else found

    def _pixels_of_images(self, images: Sequence[Image]) -> dict[str, Tensor]:
        found = dict(self._images(images=[load_image(image) for image in images], return_tensors="pt"))
        for image, grid in zip(images, found["image_grid_thw"].tolist(), strict=True):
            if tuple(grid) != (1, *self._grid(image)):
                raise UserError(
                    f"{image.location}: its processor gives the grid {grid}, not that by which it was tokenized, "
                    f"{[1, *self._grid(image)]}"
                )
        return found

    def _require_videos(self, video: Video) -> VideoProcessing:
        if self.videos is None:
            raise ValueError(f"{video.location}: {self.folder} reads no videos")
        return self.videos

    def _grid(self, image: Image) -> tuple[int, int]:
        """Return the height and width in patches of an image after scaling.

        Raises:
            BadRow: "unreadable image": the processor refuses its size.
        """
        images = self._images
        factor = images.patch_size * images.merge_size
        limits = {"min_pixels": images.size.shortest_edge, "max_pixels": images.size.longest_edge}
        if self._has_frames:
            frames = images.temporal_patch_size
            limits |= {"num_frames": frames, "temporal_factor": frames}
        try:
            size = self._resize(height=image.height, width=image.width, factor=factor, **limits)
        except ValueError as error:
            raise BadRow(UNREADABLE, f"{image.location}: {image.height}x{image.width}: {error}") from error
        return size[0] // images.patch_size, size[1] // images.patch_size

    @cached_property
    def _images(self) -> Any:
        """The image processor, with this run's limits."""
        images = open_image_processor(self.folder)
        least, most = self.limits.min_pixels, self.limits.max_pixels
        # GLM-4V counts the pixels of all frames; an image is repeated as often as a temporal patch has frames.
        frames = images.temporal_patch_size if "num_frames" in _parameters(_resize_of(images)) else 1
        most = images.size.longest_edge if most is None else most * frames
        least = min(images.size.shortest_edge, most) if least is None else least * frames
        images.size = SizeDict(shortest_edge=least, longest_edge=max(most, least))
        return images

    @cached_property
    def _resize(self) -> Any:
        return _resize_of(self._images)

    @cached_property
    def _has_frames(self) -> bool:
        return "num_frames" in _parameters(self._resize)

    @cached_property
    def _config(self) -> PretrainedConfig:
        return read_config(self.folder)

    @cached_property
    def _rope(self) -> Any | None:
        """The model's class with a configuration and no weights, for its positions; None where it counts up."""
        model_class: Any = MODEL_MAPPING[type(self._config)]
        if not hasattr(model_class, "get_rope_index"):
            return None
        model: Any = object.__new__(model_class)
        nn.Module.__init__(model)
        model.config = self._config
        return model

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without what is cached."""
        return {"folder": self.folder, "limits": self.limits}


def _split(images: Sequence[Image]) -> tuple[list[Image], list[Video]]:
    """Return the images, and the videos among them."""
    videos = [image for image in images if isinstance(image, Video)]
    return [image for image in images if not isinstance(image, Video)], videos


def _resize_of(image_processor: Any) -> Any:
    """Return the function by which an image processor computes the size that it scales to."""
    return sys.modules[type(image_processor).__module__].smart_resize


def _parameters(function: Any) -> Any:
    return inspect.signature(function).parameters

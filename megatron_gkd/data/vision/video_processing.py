"""What the video processors of Qwen2-VL to Qwen3.5 make of frames, computed here.

Those of transformers cannot be built without torchvision. The sizes, tokens and pixels are the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.vision.image import Video
from megatron_gkd.data.vision.video_files import UNREADABLE, VideoReference, load_frames
from megatron_gkd.errors import UserError

# By model type: whether timestamps stand before the frames, and sizes count the pixels of all of them.
_HAS_TIMESTAMPS = {
    "qwen2_vl": False,
    "qwen2_5_vl": False,
    "qwen3_vl": True,
    "qwen3_vl_moe": True,
    "qwen3_5": True,
    "qwen3_5_moe": True,
}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_DEFAULTS: dict[bool, dict[str, Any]] = {  # those of transformers' classes
    False: dict(
        size=(128 * 28 * 28, 28 * 28 * 768), image_mean=_CLIP_MEAN, image_std=_CLIP_STD, patch_size=14, fps=2.0
    ),
    True: dict(size=(128 * 32 * 32, 32 * 32 * 768), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, patch_size=16, fps=2),
}
_COMMON = dict(temporal_patch_size=2, merge_size=2, min_frames=4, max_frames=768, rescale_factor=1 / 255)
_REQUIRED = dict(do_resize=True, do_rescale=True, do_normalize=True, resample=3)


def has_videos(config: PretrainedConfig) -> bool:
    """Return whether videos are supported for models with this configuration."""
    return config.model_type in _HAS_TIMESTAMPS


@dataclass(eq=False)
class VideoProcessing:
    """What such a processor makes of videos.

    Attributes:
        folder: of the checkpoint.
        config: of the model.
    """

    folder: Path
    config: PretrainedConfig

    @property
    def placeholder_id(self) -> int:
        """The token that stands for a video in a rendered row, once a video, before `tokens` replaces it."""
        id_: int = self.config.video_token_id
        return id_

    @property
    def has_timestamps(self) -> bool:
        """Whether each group of frames has its time before it, and tokens around it."""
        return _HAS_TIMESTAMPS[self.config.model_type]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """All that the tokens and pixels of a video depend on, as JSON values.

        Raises:
            UserError: the checkpoint's settings are of a kind that is not supported.
        """
        found = _read_settings(self.folder)
        defaults = _DEFAULTS[self.has_timestamps] | _COMMON
        for name, value in _REQUIRED.items():
            if found.get(name, value) != value:
                raise UserError(
                    f"{self.folder}: its video processor has {name} = {found[name]!r}; only {value!r} is supported"
                )
        settings = {name: found.get(name) or value for name, value in defaults.items()}
        size = found.get("size") or {}
        least, most = defaults["size"]
        settings["size"] = [
            found.get("min_pixels") or size.get("shortest_edge") or least,
            found.get("max_pixels") or size.get("longest_edge") or most,
        ]
        return settings | {"has_timestamps": self.has_timestamps, "placeholder_id": self.placeholder_id}

    def sample(self, num_frames: int, fps: float, reference: VideoReference) -> list[int]:
        """Return the frames to read of a file of so many, of which `fps` are a second.

        Raises:
            ValueError: it has too few.
        """
        settings = self.settings
        most = min(reference.max_frames or settings["max_frames"], num_frames)
        wanted = num_frames / fps * (reference.fps or settings["fps"])
        if self.has_timestamps:
            number = min(max(int(wanted), settings["min_frames"]), most)
            return [int(index) for index in np.linspace(0, num_frames - 1, number).round()]
        group = settings["temporal_patch_size"]
        number = min(max(wanted, settings["min_frames"]), most // group * group)
        number = math.floor(number / group) * group
        if number < 1:
            raise ValueError(f"it has {num_frames} frames; {group} are the fewest that the model reads")
        return [int(index) for index in torch.arange(0, num_frames, num_frames / number).int()]

    def grid(self, video: Video) -> tuple[int, int, int]:
        """Return the groups of frames, and the height and width in patches after scaling.

        Raises:
            BadRow: "unreadable video": the processor refuses the size of its frames.
        """
        settings = self.settings
        (least, most), group = settings["size"], settings["temporal_patch_size"]
        factor = settings["patch_size"] * settings["merge_size"]
        height, width, number = video.height, video.width, len(video.frames)
        try:
            if self.has_timestamps:
                # The module of this function needs torchvision in other versions of transformers.
                from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_frames

                scaled = resize_frames(number, height, width, group, factor, least, most)
            else:
                scaled = smart_resize(height, width, factor, least, most)
        except ValueError as error:
            raise BadRow(UNREADABLE, f"{video.location}: {height}x{width}: {error}") from error
        return -(-number // group), scaled[0] // settings["patch_size"], scaled[1] // settings["patch_size"]

    def tokens(self, video: Video) -> list[int]:
        """Return the ids that replace the video's placeholder."""
        groups, height, width = self.grid(video)
        frame = [self.placeholder_id] * (height * width // self.settings["merge_size"] ** 2)
        if not self.has_timestamps:
            return frame * groups
        framed = [self.config.vision_start_token_id, *frame, self.config.vision_end_token_id]
        times = self._times(video)
        return [id_ for time in times for id_ in [*self._encode(f"<{time:.1f} seconds>"), *framed]]

    def set_times(self, positions: Tensor, is_video: Tensor, videos: Sequence[Video]) -> None:
        """Set the temporal positions of videos where the model counts seconds (Qwen2.5-VL); others are as they are.

        transformers 5.12 rounds the seconds of a group of frames down before it multiplies: with a little more than two
        frames per second, all frames would have one position. Later versions round as here.

        Args:
            positions: int64 [3, 1, L], changed in place.
            is_video: bool [1, L], which tokens are of videos.
            videos: in order.
        """
        rate = getattr(self.config.vision_config, "tokens_per_second", None)
        if rate is None or self.has_timestamps:
            return
        groups = []
        for video in videos:
            number, height, width = self.grid(video)
            tokens = height * width // self.settings["merge_size"] ** 2
            interval = rate * torch.tensor(self.settings["temporal_patch_size"] / video.sampled_fps)
            groups.append((torch.arange(number) * interval).long().repeat_interleave(tokens))
        # A video's first token has the first of its positions in all three rows, and its height starts with it.
        lengths = torch.tensor([len(group) for group in groups])
        starts = positions[1][is_video][lengths.cumsum(0) - lengths].repeat_interleave(lengths)
        positions[0][is_video] = torch.cat(groups) + starts

    def pixels(self, videos: Sequence[Video]) -> dict[str, Tensor]:
        """Decode videos and return `pixel_values_videos` and `video_grid_thw`.

        Raises:
            UserError: a video cannot be read, or is not the one that was tokenized.
        """
        if not videos:
            return {}
        grids = [self.grid(video) for video in videos]
        patches = [self._patches(load_frames(video), grid) for video, grid in zip(videos, grids, strict=True)]
        return {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}

    def _patches(self, frames: np.ndarray, grid: tuple[int, int, int]) -> Tensor:
        """Return the patches of frames, uint8 [T, H, W, 3], as float32 [patches, values of a patch]."""
        settings = self.settings
        patch, merge, group = settings["patch_size"], settings["merge_size"], settings["temporal_patch_size"]
        groups, height, width = grid
        # A copy: decoded frames may not be writable.
        pixels = _scale(torch.tensor(frames).permute(0, 3, 1, 2), height * patch, width * patch)
        unit = 1.0 / settings["rescale_factor"]
        mean, std = (torch.tensor(settings[name]) * unit for name in ("image_mean", "image_std"))
        pixels = (pixels.float() - mean[:, None, None]) / std[:, None, None]
        missing = groups * group - len(pixels)
        pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)])
        pixels = pixels.view(groups, group, 3, height // merge, merge, patch, width // merge, merge, patch)
        return pixels.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(groups * height * width, -1)

    def _times(self, video: Video) -> list[float]:
        """Return the time of each group of frames in seconds: the mean of its first and last frame's."""
        group = self.settings["temporal_patch_size"]
        frames = [*video.frames, *[video.frames[-1]] * (-len(video.frames) % group)]
        times = [frame / video.fps for frame in frames]
        return [(times[i] + times[i + group - 1]) / 2 for i in range(0, len(times), group)]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    @cached_property
    def _tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)


def _scale(frames: Tensor, height: int, width: int) -> Tensor:
    """Scale frames, uint8 [T, C, H, W], as torchvision does it."""
    if frames.shape[-2:] == (height, width):
        return frames
    return functional.interpolate(frames, size=(height, width), mode="bicubic", align_corners=False, antialias=True)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of a checkpoint's video processor, from the first of the files that has some."""
    processor = _read_json(folder / "processor_config.json").get("video_processor")
    names = ("video_preprocessor_config.json", "preprocessor_config.json")
    return processor or next((found for name in names if (found := _read_json(folder / name))), {})


def _read_json(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found

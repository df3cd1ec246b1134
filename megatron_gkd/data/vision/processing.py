"""The protocol by which rows with images become the inputs of a multimodal model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from megatron_gkd.data.vision.image import Image, Video
from megatron_gkd.data.vision.video_processing import VideoProcessing


class ImageProcessing(Protocol):
    """What a multimodal checkpoint's processor makes of images, and of videos among them (``Video``).

    All but `pixels` needs sizes alone.
    """

    @property
    def placeholder_id(self) -> int:
        """The token that stands for an image in a rendered row, once an image, before `tokens` replaces it."""
        ...

    @property
    def videos(self) -> VideoProcessing | None:
        """What the processor makes of videos; None where they are not supported."""
        ...

    @property
    def reserved_ids(self) -> tuple[int, ...]:
        """Ids that stand for images, videos or audio: no text of a row has them, and none is sampled."""
        ...

    @property
    def position_rows(self) -> int:
        """Number of positions of a token: 3 with multimodal rotary embeddings, otherwise 1."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """All that the tokens and pixels of an image depend on, as JSON values: equal where two processors agree."""
        ...

    def tokens(self, image: Image) -> list[int]:
        """Return the ids that replace the image's placeholder."""
        ...

    def num_patches(self, image: Image) -> int:
        """Return the number of patches that the vision tower computes, by which its memory goes."""
        ...

    def positions(self, input_ids: np.ndarray, images: Sequence[Image]) -> np.ndarray:
        """Return the positions of a whole sequence without padding, int64 [position_rows, L].

        Args:
            input_ids: int64 [L], with `tokens` in place.
            images: those of the sequence, in order.
        """
        ...

    def pixels(self, images: Sequence[Image]) -> dict[str, Tensor]:
        """Decode images and return the keyword arguments of the model's forward, concatenated over the images.

        Raises:
            UserError: an image can't be read, or is not the one that was tokenized.
        """
        ...


def placeholder_of(image: Image, processing: ImageProcessing) -> int:
    """Return the token that stands for an image or a video in a rendered row."""
    if not isinstance(image, Video):
        return processing.placeholder_id
    if processing.videos is None:
        raise ValueError(f"{image.location}: the model reads no videos")
    return processing.videos.placeholder_id


def placeholder_ids(processing: ImageProcessing) -> list[int]:
    """Return the tokens that stand for images and for videos in a rendered row."""
    videos = [] if processing.videos is None else [processing.videos.placeholder_id]
    return [processing.placeholder_id, *videos]

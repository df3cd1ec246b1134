"""Comparison of the processors of two models."""

from __future__ import annotations

import hashlib
import json

import numpy as np

from megatron_gkd.data.vision.image import Image, Video
from megatron_gkd.data.vision.processing import ImageProcessing

_SIZES = ((64, 96), (448, 224))  # height and width of images whose positions are compared


def is_same_processing(a: ImageProcessing, b: ImageProcessing) -> bool:
    """Return whether two processors make the same tokens, positions and pixels of every image.

    Tokens and pixels follow from the processors' settings. Positions also follow from the models' configurations: they
    are compared for a sequence with two images, and a video where both read videos.
    """
    if a.settings != b.settings or a.position_rows != b.position_rows:
        return False
    images = [Image("", height, width, "") for height, width in _SIZES]
    if a.videos is not None and b.videos is not None:
        images.append(Video("", *_SIZES[0], "", frames=tuple(range(8)), fps=1.0, num_frames=8))
    ids, other_ids = (_interleave(processing, images) for processing in (a, b))
    return np.array_equal(ids, other_ids) and np.array_equal(a.positions(ids, images), b.positions(ids, images))


def hash_processing(processing: ImageProcessing) -> str:
    """Hash what determines the tokens and the pixels of images (32 hex digits)."""
    return hashlib.sha256(json.dumps(processing.settings, sort_keys=True).encode()).hexdigest()[:32]


def _interleave(processing: ImageProcessing, images: list[Image]) -> np.ndarray:
    """Return each image's tokens between text, int64."""
    text = next(id_ for id_ in range(len(processing.reserved_ids) + 1) if id_ not in processing.reserved_ids)
    parts = [[text, *processing.tokens(image)] for image in images]
    return np.array([id_ for part in parts for id_ in part] + [text, text], dtype=np.int64)

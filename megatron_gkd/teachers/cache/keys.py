"""Keys of cached rows: hashes of a row's tokens, images, the positions that are trained on, and the teacher's prompt.

A row has the same key in every file, batch and layout, and equal rows share one entry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

import numpy as np
import torch.distributed as dist

from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.sample import IGNORED_LABEL, Sample
from megatron_gkd.data.vision.image import Image

KEY_BYTES = 16
KEY = np.dtype(f"S{KEY_BYTES}")  # compared and sorted in arrays; taken out, an element would lose zeros at its end


def row_key(sample: Sample) -> bytes:
    """Return the BLAKE2b hash, of `KEY_BYTES` bytes, of all that the teacher may read of a row.

    These are the token ids, the label positions, the teacher's prompt, and the digests of the images of both. Rows
    without images have the keys that they had before there were images, so that older caches stay valid.
    """
    key = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in (sample.input_ids, sample.teacher_prompt):
        key.update((-1 if ids is None else len(ids)).to_bytes(8, "little", signed=True))
        key.update(b"" if ids is None else np.ascontiguousarray(ids, dtype="<i8").tobytes())
    key.update(np.packbits(sample.labels != IGNORED_LABEL).tobytes())
    if sample.images or sample.teacher_images:
        key.update(json.dumps([_digests(sample.images), _digests(sample.teacher_images)]).encode())
    return key.digest()


def _digests(images: Iterable[Image] | None) -> list[str] | None:
    return None if images is None else [image.digest for image in images]


def row_keys(samples: Iterable[Sample]) -> np.ndarray:
    """Return the keys of `samples` in order: `KEY` [n]."""
    return np.array([row_key(sample) for sample in samples], dtype=KEY)


def dataset_keys(dataset: SampleDataset) -> np.ndarray:
    """Return the keys of all rows, `KEY` [rows]; every rank computes a share. All ranks must call it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts: list[np.ndarray | None] = [None] * size
    dist.all_gather_object(parts, row_keys(dataset[row] for row in range(rank, len(dataset), size)))
    keys = np.empty(len(dataset), dtype=KEY)
    for first, part in enumerate(parts):
        keys[first::size] = part
    return keys

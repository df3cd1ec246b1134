"""Keys of cached rows: hashes of a row's tokens, of the positions that are trained on, and of the teacher's prompt.

A row has the same key in every file, batch and layout, and equal rows share one entry.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch.distributed as dist

from megatron_gkd.data.loader import SampleDataset
from megatron_gkd.data.sample import IGNORED_LABEL, Sample

KEY_BYTES = 16
KEY = np.dtype(f"S{KEY_BYTES}")  # compared and sorted in arrays; taken out, an element would lose zeros at its end


def row_key(sample: Sample) -> bytes:
    """Return the BLAKE2b hash, of `KEY_BYTES` bytes, of a row's token ids, label positions and teacher's prompt."""
    key = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in (sample.input_ids, sample.teacher_prompt):
        key.update((-1 if ids is None else len(ids)).to_bytes(8, "little", signed=True))
        key.update(b"" if ids is None else np.ascontiguousarray(ids, dtype="<i8").tobytes())
    key.update(np.packbits(sample.labels != IGNORED_LABEL).tobytes())
    return key.digest()


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

"""What a cached row is found by: its tokens, which of them are trained on, and what the teacher read.

So a row has the same key wherever it stands, in whatever batch and layout, and equal rows share one entry.
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
    """Of `KEY_BYTES` bytes: BLAKE2b of the token ids, of which are labels, and of the teacher's own prompt."""
    key = hashlib.blake2b(digest_size=KEY_BYTES)
    for ids in (sample.input_ids, sample.teacher_prompt):
        key.update((-1 if ids is None else len(ids)).to_bytes(8, "little", signed=True))
        key.update(b"" if ids is None else np.ascontiguousarray(ids, dtype="<i8").tobytes())
    key.update(np.packbits(sample.labels != IGNORED_LABEL).tobytes())
    return key.digest()


def keys_of(samples: Iterable[Sample]) -> np.ndarray:
    """`KEY` [n], of `samples` in order."""
    return np.array([row_key(sample) for sample in samples], dtype=KEY)


def dataset_keys(dataset: SampleDataset) -> np.ndarray:
    """`KEY` [rows], of all rows; every rank of the world works out its share. All must call it."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts: list[np.ndarray | None] = [None] * size
    dist.all_gather_object(parts, keys_of(dataset[row] for row in range(rank, len(dataset), size)))
    keys = np.empty(len(dataset), dtype=KEY)
    for first, part in enumerate(parts):
        keys[first::size] = part
    return keys

"""Which of a microbatch's labels a context-parallel rank has: how what is known by row finds its place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import IGNORE
from megatron_gkd.runtime.context_parallel import context_parallel_indices


def label_numbers(microbatch: Microbatch, cp_rank: int, cp_size: int) -> Tensor:
    """int64 [N], on the CPU: the labels that this rank trains on, numbered over the whole microbatch.

    The numbers count the labels that are not -100 of all `samples`, one sample after the other. Position i of the
    result belongs to row i of what the loss sees of this rank (`models.label_rows.has_label`).
    """
    boundaries = microbatch.cu_seqlens.cpu()
    numbers = np.full(int(boundaries[-1]), -1, dtype=np.int64)
    count = 0
    for sample, start in zip(microbatch.samples, boundaries.tolist(), strict=False):  # padding may follow the samples
        places = start + np.flatnonzero(sample.labels != IGNORE)
        numbers[places] = np.arange(count, count + len(places))
        count += len(places)
    mine = torch.from_numpy(numbers)[context_parallel_indices(boundaries, cp_rank, cp_size)]
    return mine[mine >= 0]


def num_labels(microbatch: Microbatch) -> int:
    """Labels of the whole microbatch, over all context-parallel ranks."""
    return sum(int((sample.labels != IGNORE).sum()) for sample in microbatch.samples)

"""Which of a microbatch's labels a context-parallel rank has: the map from values of rows to their ranks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.runtime.context_parallel import context_parallel_indices


def local_label_indices(microbatch: Microbatch, cp_rank: int, cp_size: int) -> Tensor:
    """Return the indices, among the labels of the whole microbatch, of those that a context-parallel rank has.

    Labels are counted over all `samples`, one sample after the other. Entry i of the result belongs to entry i of
    ``Microbatch.label_positions`` on that rank.

    Returns:
        int64 [N], on the CPU.
    """
    boundaries = microbatch.cu_seqlens.cpu()
    indices = np.full(int(boundaries[-1]), -1, dtype=np.int64)
    count = 0
    for sample, start in zip(microbatch.samples, boundaries.tolist(), strict=False):  # padding may follow the samples
        positions = start + sample.label_positions
        indices[positions] = np.arange(count, count + len(positions))
        count += len(positions)
    local = torch.from_numpy(indices)[context_parallel_indices(boundaries, cp_rank, cp_size)]
    return local[local >= 0]

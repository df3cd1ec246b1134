"""The rows of hidden states that the loss looks at."""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)

from megatron_gkd.runtime.mesh import Mesh


def label_rows(hidden: torch.Tensor, positions: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """[1, T(/TP), H] -> [N, H]: the states at `positions` (``Microbatch.label_positions``), on every tensor-parallel rank.

    The gradient that comes back is partial on each rank (each holds a shard of the vocabulary) and is reduced here,
    once: scattered over the sequence under sequence parallelism, else summed.
    """
    rows = hidden.squeeze(0)
    if mesh.layout.sequence_parallel:
        rows = gather_from_sequence_parallel_region(rows, group=mesh.tp)
    else:
        rows = copy_to_tensor_model_parallel_region(rows, group=mesh.tp)
    return rows[positions]

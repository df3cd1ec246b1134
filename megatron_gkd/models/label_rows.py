"""Select the rows of hidden states that have labels."""

from __future__ import annotations

import torch

from megatron_gkd.runtime.mesh import Mesh

from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)


def label_rows(hidden: torch.Tensor, positions: torch.Tensor, mesh: Mesh) -> torch.Tensor:
    """Return the rows of `hidden` at `positions`, [N, H], on every tensor-parallel rank.

    Each rank's gradient of these rows is partial, as it holds a shard of the vocabulary. It is reduced here, once:
    scattered over the sequence under sequence parallelism, otherwise summed.

    Args:
        hidden: [1, T, H], or [1, T/TP, H] under sequence parallelism.
        positions: int64 [N], of `Microbatch.label_positions`.
        mesh: the process groups.
    """
    rows = hidden.squeeze(0)
    if mesh.layout.sequence_parallel:
        rows = gather_from_sequence_parallel_region(rows, group=mesh.tp)
    else:
        rows = copy_to_tensor_model_parallel_region(rows, group=mesh.tp)
    return rows[positions]

"""Some rows of a microbatch as a microbatch of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.loader import padding_sample
from megatron_gkd.data.microbatch import Microbatch, collate, shard_context_parallel
from megatron_gkd.data.sample import Sample
from megatron_gkd.runtime.mesh import Mesh


def select_rows(microbatch: Microbatch, wanted: Callable[[Sample], bool], mesh: Mesh) -> tuple[Microbatch, Tensor]:
    """The rows that are `wanted`, cut for this context-parallel rank, and where their labels stand in `microbatch`.

    Where none is wanted it is one row of one token without a label, so that every rank has equally many microbatches.

    Returns:
        The microbatch, on the device of `microbatch`, and int64 [n], rising: its labels on this rank among those that
        this rank has of `microbatch`. Rows are cut one by one, so they are on the same ranks in both.
    """
    chosen = [wanted(sample) for sample in microbatch.samples]
    samples = [sample for sample, is_wanted in zip(microbatch.samples, chosen, strict=True) if is_wanted]
    whole = collate(samples or [padding_sample()], pad_multiple=mesh.layout.pad_multiple)
    device = microbatch.input_ids.device
    part = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size()).to(device)
    counts = [sample.num_labels for sample in microbatch.samples]
    of_wanted = torch.from_numpy(np.repeat(np.array(chosen, dtype=bool), counts))
    numbers = local_label_indices(microbatch, mesh.cp.rank(), mesh.cp.size())
    return part, of_wanted[numbers].nonzero().squeeze(1).to(device)

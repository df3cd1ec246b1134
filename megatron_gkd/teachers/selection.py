"""Selection of some rows of a microbatch as a microbatch of their own."""

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


def select_rows(microbatch: Microbatch, is_selected: Callable[[Sample], bool], mesh: Mesh) -> tuple[Microbatch, Tensor]:
    """Select rows of a microbatch.

    Where no row is selected the result has one row of one token without a label, so that every rank has equally many
    microbatches.

    Returns:
        The microbatch of this context-parallel rank, on the device of `microbatch`, and int64 [n], rising: the indices
        of its labels among those that this rank has of `microbatch`. Each row is sharded by itself, so its labels are
        on the same ranks in both.
    """
    selection = [is_selected(sample) for sample in microbatch.samples]
    samples = [sample for sample, chosen in zip(microbatch.samples, selection, strict=True) if chosen]
    whole = collate(
        samples or [padding_sample()], pad_multiple=mesh.layout.pad_multiple, total_multiple=mesh.layout.total_multiple
    )
    device = microbatch.input_ids.device
    selected = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size()).to(device)
    counts = [sample.num_labels for sample in microbatch.samples]
    of_selected = torch.from_numpy(np.repeat(np.array(selection, dtype=bool), counts))
    indices = local_label_indices(microbatch, mesh.cp.rank(), mesh.cp.size())
    return selected, of_selected[indices].nonzero().squeeze(1).to(device)

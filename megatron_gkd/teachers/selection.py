"""Some rows of a microbatch as a microbatch of their own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_gkd.data.label_numbers import label_numbers
from megatron_gkd.data.loader import filler
from megatron_gkd.data.microbatch import Microbatch, collate, shard_context_parallel
from megatron_gkd.data.sample import IGNORE, Sample
from megatron_gkd.runtime.mesh import Mesh

_PAD_TOKEN_ID = 0  # padding is never looked at


def select_rows(microbatch: Microbatch, wanted: Callable[[Sample], bool], mesh: Mesh) -> tuple[Microbatch, Tensor]:
    """The rows that are `wanted`, cut for this context-parallel rank, and where their labels stand in `microbatch`.

    Where none is wanted it is one row of one token without a label, so that every rank has equally many microbatches.

    Returns:
        The microbatch, on the device of `microbatch`, and int64 [n], rising: its labels on this rank among those that
        this rank has of `microbatch`. Rows are cut one by one, so they are on the same ranks in both.
    """
    chosen = [wanted(sample) for sample in microbatch.samples]
    samples = [sample for sample, is_wanted in zip(microbatch.samples, chosen, strict=True) if is_wanted]
    whole = collate(
        samples or [filler(_PAD_TOKEN_ID)], pad_multiple=mesh.layout.pad_multiple, pad_token_id=_PAD_TOKEN_ID
    )
    device = microbatch.input_ids.device
    part = shard_context_parallel(whole, mesh.cp.rank(), mesh.cp.size()).to(device)
    counts = [int((sample.labels != IGNORE).sum()) for sample in microbatch.samples]
    of_wanted = torch.from_numpy(np.repeat(np.array(chosen, dtype=bool), counts))
    numbers = label_numbers(microbatch, mesh.cp.rank(), mesh.cp.size())
    return part, of_wanted[numbers].nonzero().squeeze(1).to(device)

"""Megatron's pipeline schedules, driven with lists of microbatches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import nn

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.runtime.mesh import Mesh

M = TypeVar("M", bound=Microbatch)

Forward = Callable[[nn.Module, M], torch.Tensor]


def forward_backward(
    chunks: list[nn.Module],
    microbatches: Sequence[M],
    forward: Forward[M],
    loss: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor, Any]],
    mesh: Mesh,
    *,
    backward: bool = True,
    force_all_reduce: bool = False,
) -> list[Any]:
    """1F1B, or interleaved where there are virtual stages, over `chunks`.

    `loss(output, index)` gets the last stage's output of microbatch `index` and gives (sum of losses, number of tokens,
    record). Returns the records, on the last pipeline stage; an empty list elsewhere.

    `force_all_reduce`: leave whole gradients on every rank, even under the distributed optimizer.
    """

    def step(iterator, chunk):
        index = next(iterator)
        return forward(chunk, microbatches[index]), partial(_call_with_index, loss, index)

    return _run(chunks, microbatches, step, mesh, forward_only=not backward, force_all_reduce=force_all_reduce)


def forward_only(
    chunks: list[nn.Module],
    microbatches: Sequence[M],
    forward: Forward[M],
    collect: Callable[[torch.Tensor, M], Any],
    mesh: Mesh,
) -> list[Any]:
    """Forward passes alone: `collect(output, microbatch)` of each on the last pipeline stage, None elsewhere."""

    def step(iterator, chunk):
        index = next(iterator)

        def gather(output, non_loss_data=True):
            return collect(output, microbatches[index])

        return forward(chunk, microbatches[index]), gather

    collected = _run(chunks, microbatches, step, mesh, forward_only=True, collect_non_loss_data=True)
    return collected or [None] * len(microbatches)


def _call_with_index(loss, index, output):
    return loss(output, index)


def _run(chunks, microbatches: Sequence[Microbatch], step, mesh: Mesh, **options) -> list[Any]:
    interleaved = len(chunks) > 1
    schedule = get_forward_backward_func(pp_size=mesh.pp.size(), vp_size=len(chunks) if interleaved else None)
    indices = [iter(range(len(microbatches))) for _ in chunks]
    return schedule(
        forward_step_func=step,
        data_iterator=indices if interleaved else indices[0],
        model=chunks if interleaved else chunks[0],
        num_microbatches=len(microbatches),
        # Of every microbatch, if interleaved; else shapes travel with the tensors.
        seq_length=microbatches[0].total_length,
        micro_batch_size=1,
        **options,
    )

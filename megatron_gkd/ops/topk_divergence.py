"""The divergence over the teacher's top-k tokens, from logits that are sharded over the vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.ops.spec import DivergenceSpec, TailMode, TopKShardSpec, TopKSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_statistics import (
    LogSum,
    TopKNormalizers,
    TopKRows,
    compute_topk_forward,
    write_topk_gradient,
)


def topk_divergence(
    student_logits: Tensor,
    topk: TopK,
    spec: DivergenceSpec,
    *,
    tail_mode: TailMode = "renormalize",
    mask: Tensor | None = None,
) -> Tensor:
    """Return the divergence of each token over the teacher's top-k, in nats.

    Args:
        student_logits: float [..., V/TP], this rank's columns. -inf excludes an entry.
        topk: the teacher's, [..., k], the same on all ranks. Missing entries, and ids from the size of the vocabulary
            on, do not count.
        spec: the divergence, and the ranks that share the vocabulary.
        tail_mode: "renormalize" both distributions over the k tokens, or add the others as one "bucket"; see
            ``topk_statistics``.
        mask: bool [...], True for the tokens that count.

    Returns:
        [...] in fp32 (fp64 for fp64 student logits), with the same bits on every rank of the group; 0 where masked,
        and where `topk` has no entry. Two collectives in forward, of 8 (with a bucket 16) and 28 bytes per token, none
        in backward, for which the inputs and 3 (5) numbers per token are saved.

    Raises:
        ValueError: shapes or dtypes do not agree, or `topk` has no tail at the temperature, which a bucket needs.
    """
    if not student_logits.is_floating_point() or student_logits.dim() == 0:
        raise ValueError(
            f"student_logits = {student_logits.dtype} {list(student_logits.shape)}: must be floats [..., V]"
        )
    tokens, width = student_logits.shape[:-1], student_logits.shape[-1]
    if topk.ids.shape[:-1] != tokens:
        raise ValueError(f"topk = tokens {list(topk.ids.shape[:-1])}: must be {list(tokens)}, as student_logits are")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens):
        raise ValueError(f"mask = {mask.dtype} {list(mask.shape)}: must be torch.bool {list(tokens)}")
    shard_spec = TopKShardSpec(spec.on_shard(width), TopKSpec(tail_mode=tail_mode).tail_mode)
    flat_mask = None if mask is None else mask.reshape(-1)
    per_token = _TopKDivergence.apply(student_logits.reshape(-1, width), topk.flatten(), flat_mask, shard_spec)
    return per_token.view(tokens)


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, topk: TopK, mask: Tensor | None, spec: TopKShardSpec) -> Tensor:
        found = compute_topk_forward(student[:, : spec.shard.valid], topk, spec, mask=mask)
        log_sums = (*found.normalizers.student, *(found.normalizers.others or (None, None)))
        slope_sum = found.slope_sum.clone()  # copies, which do not keep all sums alive
        ctx.save_for_backward(student, topk.ids, topk.values, topk.tail, mask, *log_sums, slope_sum)
        ctx.spec, ctx.tail_temperature = spec, topk.temperature
        return found.divergence.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, ids, values, tail, mask, *log_sums, slope_sum = ctx.saved_tensors
        others = LogSum(*log_sums[2:]) if ctx.spec.has_bucket else None
        weight = upstream if mask is None else torch.where(mask, upstream, 0)
        rows = TopKRows(TopKNormalizers(LogSum(*log_sums[:2]), others), slope_sum, weight)
        topk = TopK(ids, values, tail, ctx.tail_temperature)
        gradient = torch.empty_like(student)
        write_topk_gradient(gradient, student[:, : ctx.spec.shard.valid], topk, rows, ctx.spec)
        return gradient, None, None, None

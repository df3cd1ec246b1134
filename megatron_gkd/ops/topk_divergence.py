"""The divergence over the teacher's top-k tokens of materialised logits, sharded over the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_statistics import (
    LogSum,
    TailMode,
    TopKNormalizers,
    TopKSpec,
    measure_topk,
    write_topk_gradient,
)


def topk_divergence(
    student_logits: Tensor,
    topk: TopK,
    *,
    beta: float,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    tail_mode: TailMode = "renormalize",
    divergence: str = "jsd",
) -> Tensor:
    """The divergence of each token over the teacher's top-k, in nats.

    Args:
        student_logits: [..., V/TP], of any float type: this rank's columns. -inf excludes an entry.
        topk: the teacher's [..., k], the same on all ranks. Missing entries, and ids from `vocab_size` on, don't count.
        beta, temperature, group, vocab_size, mask: as for ``divergence.vocab_parallel_divergence``.
        tail_mode: "renormalize" over the k tokens, or a "bucket" for the rest; see ``topk_statistics``.
        divergence: a name of ``reference.FAMILIES``, whose formulas say what `beta` means to it.

    Returns:
        [...] in fp32 (fp64 for fp64 student logits), the same bits on every rank of the group; exactly 0 where masked,
        and where `topk` has no entry at all. For backward it keeps the inputs and 3 numbers a token (5 with a bucket).
        Two collectives in forward, of 8 (16) and 28 bytes a token, none in backward.

    Raises:
        ValueError: shapes or types that don't agree, a parameter out of range, a bucket that `topk` has no tail for.
    """
    if not student_logits.is_floating_point() or student_logits.dim() == 0:
        raise ValueError(
            f"student_logits are {student_logits.dtype} {list(student_logits.shape)}; allowed are floats [..., V]"
        )
    tokens, width = student_logits.shape[:-1], student_logits.shape[-1]
    if topk.ids.shape[:-1] != tokens:
        raise ValueError(f"topk is for tokens {list(topk.ids.shape[:-1])}; student_logits are for {list(tokens)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; it must be torch.bool {list(tokens)}")
    spec = TopKSpec.of(
        width,
        beta=beta,
        temperature=temperature,
        group=group,
        vocab_size=vocab_size,
        tail_mode=tail_mode,
        divergence=divergence,
    )
    flat = topk.flatten()
    per_token = _TopKDivergence.apply(
        student_logits.reshape(-1, width),
        flat.ids,
        flat.values,
        flat.tail,
        None if mask is None else mask.reshape(-1),
        topk.temperature,
        spec,
    )
    return per_token.view(tokens)


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student: Tensor,
        ids: Tensor,
        values: Tensor,
        tail: Tensor | None,
        mask: Tensor | None,
        tail_temperature: float | None,
        spec: TopKSpec,
    ) -> Tensor:
        topk = TopK(ids, values, tail, tail_temperature)
        normalizers, sums = measure_topk(student[:, : spec.shard.valid], topk, spec, mask=mask)
        ctx.spec, ctx.tail_temperature = spec, tail_temperature
        others = normalizers.others or (None, None)
        ctx.save_for_backward(student, ids, values, tail, mask, *normalizers.student, *others, sums.slope.clone())
        return sums.value.clone()  # copies, lest they keep all sums alive

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        student, ids, values, tail, mask, *log_sums, slope_sum = ctx.saved_tensors
        gradient = torch.empty_like(student)
        write_topk_gradient(
            gradient,
            student[:, : ctx.spec.shard.valid],
            TopK(ids, values, tail, ctx.tail_temperature),
            TopKNormalizers(LogSum(*log_sums[:2]), LogSum(*log_sums[2:]) if ctx.spec.bucket else None),
            slope_sum,
            upstream if mask is None else torch.where(mask, upstream, 0),
            ctx.spec,
        )
        return gradient, *(None,) * 6

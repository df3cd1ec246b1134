"""The divergence over the teacher's top-k tokens, from logits that are sharded over the vocabulary.

It is registered with torch.library, as ``divergence`` is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_gkd.ops import topk_passes
from megatron_gkd.ops.spec import DivergenceSpec, TailMode, TopKShardSpec, TopKSpec, accumulate_dtype
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_rows import NUM_NORMALIZERS, TopKRows
from megatron_gkd.ops.topk_statistics import check_tail, compute_topk_forward
from megatron_gkd.ops.vocabulary import group_of_name, name_of_group


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
        in backward, for which the inputs and 9 numbers per token are saved.

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
    check_tail(topk, shard_spec)
    flat = topk.flatten()
    per_token, _, _ = _forward(
        student_logits.reshape(-1, width),
        flat.ids,
        flat.values,
        flat.tail if shard_spec.has_bucket else None,
        None if mask is None else mask.reshape(-1).contiguous(),
        spec.divergence,
        float(spec.beta),
        float(spec.temperature),
        shard_spec.shard.vocab_size,
        name_of_group(spec.group),
    )
    return per_token.view(tokens)


def _shard_spec(
    width: int, has_bucket: bool, divergence: str, beta: float, temperature: float, vocab_size: int, group: str
) -> TopKShardSpec:
    spec = DivergenceSpec(beta, temperature, divergence, group_of_name(group), vocab_size)
    return TopKShardSpec(spec.on_shard(width), "bucket" if has_bucket else "renormalize")


# Operators of torch.library take tensors, numbers and strings, so a specification is passed by its fields, and the tail
# mode is "bucket" where there is a tail.


@torch.library.custom_op("megatron_gkd::topk_divergence", mutates_args=())
def _forward(  # noqa: PLR0913
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    tail: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    vocab_size: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divergence [N], and what backward needs: normalizers [N, 8] and the slope sum [N]."""
    spec = _shard_spec(student.shape[1], tail is not None, divergence, beta, temperature, vocab_size, group)
    topk = TopK(ids, values, tail, None if tail is None else temperature)
    found = compute_topk_forward(student[:, : spec.shard.valid], topk, spec, mask=mask)
    return found.divergence.clone(), found.normalizers, found.slope_sum.clone()


@_forward.register_fake
def _fake_forward(student: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = student.shape[0], accumulate_dtype(student.dtype)
    return (
        student.new_empty(rows, dtype=dtype),
        student.new_empty(rows, NUM_NORMALIZERS, dtype=dtype),
        student.new_empty(rows, dtype=dtype),
    )


@torch.library.custom_op("megatron_gkd::topk_divergence_backward", mutates_args=())
def _backward(  # noqa: PLR0913
    upstream: Tensor,
    student: Tensor,
    ids: Tensor,
    values: Tensor,
    tail: Tensor | None,
    mask: Tensor | None,
    normalizers: Tensor,
    slope_sum: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    vocab_size: int,
    group: str,
) -> Tensor:
    """Return the student's gradient, [N, V/TP]."""
    spec = _shard_spec(student.shape[1], tail is not None, divergence, beta, temperature, vocab_size, group)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    weight = upstream if mask is None else torch.where(mask, upstream, 0)
    topk = TopK(ids, values, tail, None if tail is None else temperature)
    rows = TopKRows(normalizers, slope_sum, weight.contiguous())
    topk_passes.gradient(gradient, student[:, : spec.shard.valid], topk, rows, spec)
    return gradient


@_backward.register_fake
def _fake_backward(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.divergence, ctx.beta, ctx.temperature, ctx.vocab_size, ctx.group = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = None
    if upstream is not None:
        options = ctx.divergence, ctx.beta, ctx.temperature, ctx.vocab_size, ctx.group
        gradient = _backward(upstream, *ctx.saved_tensors, *options)
    return gradient, *(None,) * 9


_forward.register_autograd(_differentiate, setup_context=_setup_context)

"""The divergence of logits that are sharded over the vocabulary, with its closed-form gradient.

It is registered with torch.library: to torch.compile it is one opaque operator, collectives included, and its gradient
is another.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.forward import compute_forward
from megatron_gkd.ops.normalizers import Normalizers, TokenStatistics
from megatron_gkd.ops.params import DivergenceRows, Logits, TokenResults
from megatron_gkd.ops.spec import DivergenceSpec, ShardSpec, accumulate_dtype
from megatron_gkd.ops.vocabulary import group_of_name, name_of_group


def vocab_parallel_divergence(
    student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec, *, mask: Tensor | None = None
) -> Tensor:
    """Return the divergence of each token, in nats, from logits that are sharded over the vocabulary.

    Autograd through a plain all_reduce would drop the terms of the other shards. The gradient here is the closed form
    (slope_j - p_j sum_u slope_u) / temperature (``reference.Divergence``), with sums over the whole vocabulary.

    Args:
        student_logits: float [..., V/TP], this rank's columns. -inf excludes an entry.
        teacher_logits: [..., V/TP] of the same dtype. The teacher gets no gradient.
        spec: the divergence, and the ranks that share the vocabulary.
        mask: bool [...], True for the tokens that count; the others are not read.

    Returns:
        [...] in fp32 (fp64 for fp64), with the same bits on every rank of the group; 0 where masked. One collective in
        forward for the KL divergences, two for the others, none in backward, for which the inputs and 16 bytes per
        token are saved.

    Raises:
        ValueError: shapes or dtypes do not agree, or the shards do not hold `spec.vocab_size` columns.
    """
    return _apply(student_logits, teacher_logits, spec, mask, return_statistics=False)[0]


def vocab_parallel_divergence_with_statistics(
    student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec, *, mask: Tensor | None = None
) -> tuple[Tensor, TokenStatistics]:
    """Return ``vocab_parallel_divergence`` and the statistics of each token, [...], which come from the same passes.

    The statistics are detached, and 0 where masked.
    """
    value, statistics = _apply(student_logits, teacher_logits, spec, mask, return_statistics=True)
    return value, TokenStatistics(*(x.view(value.shape) for x in statistics.detach().unbind()))


def _apply(
    student_logits: Tensor, teacher_logits: Tensor, spec: DivergenceSpec, mask: Tensor | None, return_statistics: bool
) -> tuple[Tensor, Tensor]:
    """Return the divergence [...] and the statistics [5, N] or, without them, [5, 0]."""
    _check(student_logits, teacher_logits, mask)
    tokens, width = student_logits.shape[:-1], student_logits.shape[-1]
    value, _, _, _, statistics = _forward(
        student_logits.reshape(-1, width),
        teacher_logits.detach().reshape(-1, width),
        None if mask is None else mask.reshape(-1).contiguous(),
        spec.divergence,
        float(spec.beta),
        float(spec.temperature),
        spec.on_shard(width).shard.vocab_size,
        name_of_group(spec.group),
        return_statistics,
    )
    return value.view(tokens), statistics


def _check(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None) -> None:
    student, teacher = (f"{x.dtype} {list(x.shape)}" for x in (student_logits, teacher_logits))
    if student != teacher:
        raise ValueError(f"teacher_logits = {teacher}: must be {student}, as student_logits are")
    if not student_logits.is_floating_point() or student_logits.dim() == 0:
        raise ValueError(f"student_logits = {student}: must be floats [..., V]")
    tokens = student_logits.shape[:-1]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens):
        raise ValueError(f"mask = {mask.dtype} {list(mask.shape)}: must be torch.bool {list(tokens)}")


def _shard_spec(width: int, divergence: str, beta: float, temperature: float, vocab_size: int, group: str) -> ShardSpec:
    return DivergenceSpec(beta, temperature, divergence, group_of_name(group), vocab_size).on_shard(width)


def _valid_logits(student: Tensor, teacher: Tensor, mask: Tensor | None, spec: ShardSpec) -> Logits:
    def valid(logits: Tensor) -> Tensor:
        has_contiguous_rows = logits.stride(-1) == 1 or logits.shape[-1] <= 1
        return (logits if has_contiguous_rows else logits.contiguous())[:, : spec.shard.valid]

    return Logits(valid(student), valid(teacher), mask)


# Operators of torch.library take tensors, numbers and strings, so a specification is passed by its fields.


@torch.library.custom_op("megatron_gkd::vocab_parallel_divergence", mutates_args=())
def _forward(  # noqa: PLR0913
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    divergence: str,
    beta: float,
    temperature: float,
    vocab_size: int,
    group: str,
    return_statistics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the divergence [N], what backward needs, and the statistics [5, N], or [5, 0] without them.

    Backward needs shifts [N, 2], biases [N, 2] and the slope sum [N].
    """
    spec = _shard_spec(student.shape[1], divergence, beta, temperature, vocab_size, group)
    logits = _valid_logits(student, teacher, mask, spec)
    results = TokenResults.empty(student, has_losses=False)
    found, token = compute_forward(logits, spec, results, moments=return_statistics), results.per_token
    statistics = token.divergence.new_empty(5, 0)
    if return_statistics:
        statistics = torch.stack([getattr(token, name) for name in TokenStatistics._fields])
    value = token.divergence.clone() if mask is None else torch.where(mask, token.divergence, 0)
    normalizers = Normalizers.from_packed(found.normalizers)
    return value, normalizers.shifts, normalizers.biases, found.slope_sum, statistics


@_forward.register_fake
def _fake_forward(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, dtype, return_statistics = student.shape[0], accumulate_dtype(student.dtype), arguments[-1]
    value = student.new_empty(rows, dtype=dtype)
    return (
        value,
        student.new_empty(rows, 2, dtype=dtype),
        student.new_empty(rows, 2, dtype=torch.bfloat16),
        torch.empty_like(value),
        student.new_empty(5, rows if return_statistics else 0, dtype=dtype),
    )


@torch.library.custom_op("megatron_gkd::vocab_parallel_divergence_backward", mutates_args=())
def _backward(  # noqa: PLR0913
    upstream: Tensor,
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    shifts: Tensor,
    biases: Tensor,
    slope_sum: Tensor,
    divergence: str,
    beta: float,
    temperature: float,
    vocab_size: int,
    group: str,
) -> Tensor:
    """Return the student's gradient, [N, V/TP]."""
    spec = _shard_spec(student.shape[1], divergence, beta, temperature, vocab_size, group)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    weight = upstream if mask is None else torch.where(mask, upstream, 0)
    rows = DivergenceRows(Normalizers(shifts, biases).packed(), slope_sum, weight.contiguous())
    passes.gradient(gradient, _valid_logits(student, teacher, None, spec), rows, None, spec)
    return gradient


@_backward.register_fake
def _fake_backward(upstream: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    student, teacher, mask, *ctx.parameters, _ = inputs
    _, shifts, biases, slope_sum, _ = output
    ctx.save_for_backward(student, teacher, mask, shifts, biases, slope_sum)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upstream: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = None if upstream is None else _backward(upstream, *ctx.saved_tensors, *ctx.parameters)
    return gradient, None, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)

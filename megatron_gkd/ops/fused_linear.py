"""The language-model heads and the loss in one op, over chunks of tokens: a microbatch's logits never exist as a whole.

For each chunk of C tokens: logits of both models (two matrix products into two reused [C, V/TP] buffers), statistics,
the gradient in place of the student's logits, and from it the gradients of hidden states and head (two more products).
The gradient is thus made in the forward pass, for a total that enters the loss linearly; backward only scales it.
The scheme is that of Liger Kernel's fused linear losses (arXiv:2410.10989), here sharded over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.ops.pointwise import weighted
from megatron_gkd.ops.statistics import (
    IGNORED_LABEL,
    DivergenceSpec,
    Normalizers,
    Sums,
    Weights,
    accumulate_dtype,
    measure,
    write_gradient,
)
from megatron_gkd.ops.vocabulary import VocabShard


class PerToken(NamedTuple):
    """What was measured at each token: detached, [N], fp32 (fp64 for fp64), the same bits on all ranks of the group."""

    divergence: Tensor  # 0 without a teacher
    cross_entropy: Tensor  # untempered; 0 without labels or where the label is -100
    teacher_entropy: Tensor  # of the tempered distribution, in nats; 0 without a teacher
    student_entropy: Tensor  # likewise
    top1_agreement: Tensor  # 1.0 where both have the same most likely token; 0 without a teacher


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    beta: float,
    temperature: float,
    token_weights: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    sft_weights: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, PerToken]:
    """sum_n token_weights[n] D_n + sft_weights[n] CE_n from last hidden states and head shards.

    D is the divergence of ``divergence.vocab_parallel_divergence``, CE the untempered cross-entropy over the same true
    vocabulary. All ranks of `group` pass the same tokens. Two collectives a chunk in forward, none in backward.

    Args:
        student_hidden, teacher_hidden: [N, H_S], [N, H_T], whole on every rank of the group. No teacher (None for its
            hidden states and weight) leaves the cross-entropy only.
        student_weight, teacher_weight: [V/TP, H_S], [V/TP, H_T]: the heads' rows for the same global ids. All four
            tensors have one float type. The teacher never gets a gradient.
        token_weights: fp32 [N]; a token of weight 0 adds exactly 0, whatever its divergence.
        group, vocab_size: as for ``vocab_parallel_divergence``.
        labels: int64 [N], global ids, -100 for none; needed for the cross-entropy. An id outside the true vocabulary
            gives an infinite one.
        sft_weights: fp32 [N]; None leaves the cross-entropy out of the total, a statistic only.
        chunk_tokens: most rows of logits alive at once, of each model. Chunks are of equal size, give or take one.

    Returns:
        The total, a scalar of fp32 (fp64 for fp64), and the statistics of each token.

        The gradient of `student_hidden` is this rank's PARTIAL one, from its own columns: the caller has to sum it over
        `group`, as Megatron's mappings do in their backward (copy to the tensor-parallel region, or gather from the
        sequence-parallel region). That of `student_weight` is whole; it is accumulated in fp32 and cast at the end.
        For backward the op keeps these two gradients and nothing else.

    Raises:
        ValueError: shapes or types that don't agree, or a parameter out of range.
    """
    inputs = _Inputs(student_hidden, student_weight, teacher_hidden, teacher_weight, token_weights, labels, sft_weights)
    inputs.check(chunk_tokens)
    spec = DivergenceSpec.of(beta, temperature, VocabShard.of(student_weight.shape[0], group, vocab_size))
    needs_gradient = tuple(torch.is_grad_enabled() and x.requires_grad for x in (student_hidden, student_weight))
    total, statistics = _FusedLinear.apply(student_hidden, student_weight, inputs, spec, chunk_tokens, needs_gradient)
    return total, PerToken(*statistics.unbind(-1))


@dataclass(frozen=True)
class _Inputs:
    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    token_weights: Tensor
    labels: Tensor | None
    sft_weights: Tensor | None

    def check(self, chunk_tokens: int) -> None:
        tokens, width = self.student_hidden.shape[0], self.student_weight.shape[0]
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens is {chunk_tokens}; allowed are values from 1")
        if (self.teacher_hidden is None) != (self.teacher_weight is None):
            raise ValueError("teacher_hidden and teacher_weight must both be given, or neither")
        if self.sft_weights is not None and self.labels is None:
            raise ValueError("sft_weights need labels")
        for name in ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight"):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != self.student_hidden.dtype:
                raise ValueError(f"{name} is {tensor.dtype}, student_hidden {self.student_hidden.dtype}; need one type")
            rows = tokens if name.endswith("hidden") else width
            hidden_size = getattr(self, name.split("_")[0] + "_hidden").shape[-1]
            if tensor.shape != (rows, hidden_size):
                raise ValueError(f"{name} is {list(tensor.shape)}; it must be {[rows, hidden_size]}")
        for name in ("token_weights", "labels", "sft_weights"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != (tokens,):
                raise ValueError(f"{name} is {list(tensor.shape)}; it must be {[tokens]}, one for each token")


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        student_hidden: Tensor,
        student_weight: Tensor,
        inputs: _Inputs,
        spec: DivergenceSpec,
        chunk_tokens: int,
        needs_gradient: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        total, statistics, *gradients = _forward(inputs, spec, chunk_tokens, *needs_gradient)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(statistics)
        return total, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _statistics: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = (None if g is None else g * upstream for g in ctx.saved_tensors)
        return hidden_gradient, weight_gradient, None, None, None, None


def _forward(
    inputs: _Inputs, spec: DivergenceSpec, chunk_tokens: int, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The total, the statistics [N, 5], and the gradients that are needed."""
    hidden, valid = inputs.student_hidden, spec.shard.valid
    accumulate = accumulate_dtype(hidden.dtype)
    student_weight = inputs.student_weight[:valid]  # the head's padding is never multiplied
    teacher_weight = None if inputs.teacher_weight is None else inputs.teacher_weight[:valid]
    hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
    weight_gradient = torch.zeros_like(inputs.student_weight, dtype=accumulate) if needs_weight else None

    total = torch.zeros((), dtype=accumulate, device=hidden.device)
    statistics = torch.zeros(len(hidden), len(PerToken._fields), dtype=accumulate, device=hidden.device)
    chunks = _chunks(len(hidden), chunk_tokens)
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    student_buffer = hidden.new_empty(rows, valid)
    teacher_buffer = None if teacher_weight is None else hidden.new_empty(rows, valid)
    for chunk in chunks:
        student = _logits(hidden[chunk], student_weight, student_buffer)
        teacher = None
        if teacher_weight is not None:
            teacher = _logits(inputs.teacher_hidden[chunk], teacher_weight, teacher_buffer)
        labels = None if inputs.labels is None else inputs.labels[chunk]
        weights = _weights(inputs, chunk, labels, accumulate)
        normalizers, sums = measure(student, teacher, labels, spec)
        total += _weighted_sum(weights, normalizers, sums)
        _record(statistics[chunk], normalizers, sums)
        if not (needs_hidden or needs_weight):
            continue
        write_gradient(student, student, teacher, normalizers, sums.slope, weights, spec)
        if needs_hidden:
            torch.mm(student, student_weight, out=hidden_gradient[chunk])
        if needs_weight:
            weight_gradient[:valid] += student.t() @ hidden[chunk]
    return total, statistics, hidden_gradient, None if weight_gradient is None else weight_gradient.to(hidden.dtype)


def _chunks(tokens: int, chunk_tokens: int) -> list[slice]:
    """As few chunks as `chunk_tokens` allows, of sizes that differ by one at most."""
    count = -(-tokens // chunk_tokens)
    return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])


def _weights(inputs: _Inputs, chunk: slice, labels: Tensor | None, dtype: torch.dtype) -> Weights:
    divergence = inputs.token_weights[chunk].to(dtype)
    if inputs.sft_weights is None:
        return Weights(divergence)
    cross_entropy = torch.where(labels == IGNORED_LABEL, 0, inputs.sft_weights[chunk].to(dtype))
    return Weights(divergence, cross_entropy, labels)


def _weighted_sum(weights: Weights, normalizers: Normalizers, sums: Sums) -> Tensor:
    total = weighted(weights.divergence, sums.value).sum()
    if weights.cross_entropy is not None:
        total += weighted(weights.cross_entropy, normalizers.cross_entropy).sum()
    return total


def _record(statistics: Tensor, normalizers: Normalizers, sums: Sums) -> None:
    """Write one chunk's rows of ``PerToken``; what was not measured stays 0."""
    columns = PerToken(
        sums.value, normalizers.cross_entropy, sums.teacher_entropy, sums.student_entropy, normalizers.top1_agreement
    )
    for index, column in enumerate(columns):
        if column is not None:
            statistics[:, index] = column

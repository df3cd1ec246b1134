"""The language-model heads and the loss in one op, over chunks of tokens.

The op holds the logits of one chunk at a time: at most `chunk_tokens` tokens, of this rank's vocabulary shard, of each
model. For each chunk: the logits of both models (two matrix products into two reused [C, V/TP] buffers), the
statistics, the gradient in place of the student's logits, and from it the gradients of hidden states and head (two more
products). The gradient is thus computed in the forward pass, for a total that enters the loss linearly; backward only
scales it. This is the scheme of Liger Kernel's fused linear losses (arXiv:2410.10989), sharded over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.ops.chunk_loss import (
    ChunkTargets,
    PerToken,
    compute_full_loss,
    compute_student_loss,
    compute_topk_loss,
)
from megatron_gkd.ops.head_gradient import HeadGradient, LinearGradients
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.pointwise import weighted
from megatron_gkd.ops.spec import DivergenceSpec, ShardSpec, TopKShardSpec, TopKSpec, accumulate_dtype
from megatron_gkd.ops.topk import TopK, check_k, choose_topk

DEFAULT_CHUNK_TOKENS = 1024


class LinearHead(NamedTuple):
    """Hold the operands of one model's logits.

    Attributes:
        hidden: [N, H], last hidden states, whole on every rank of the group.
        head: this rank's rows, for the same global ids in both models.
    """

    hidden: Tensor
    head: OutputHead


@dataclass(frozen=True)
class TokenTargets:
    """Hold what the loss needs of each token beside the hidden states.

    Attributes:
        token_weights: fp32 [N], of the divergence; a token of weight 0 adds exactly 0, even if its divergence is
            infinite.
        labels: int64 [N], global ids, -100 for none; needed for the cross-entropy, which is infinite for an id outside
            the true vocabulary.
        sft_weights: fp32 [N], of the cross-entropy; None leaves it out of the total, as a metric only.
    """

    token_weights: Tensor
    labels: Tensor | None = None
    sft_weights: Tensor | None = None


@dataclass(frozen=True)
class FusedLinearOptions:
    """Choose how the op computes; the result does not depend on it, but for rounding.

    Attributes:
        chunk_tokens: most tokens whose logits exist at once. Chunks are of equal size, give or take one.
        upstream: the gradient of the total that backward will pass (Megatron's loss scale), where it is known before;
            another value in backward is an error. A `main_grad` of the student's weight then receives the gradient
            chunk by chunk, without a [V/TP, H] buffer beside it. If None, it receives the gradient in backward.
    """

    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    upstream: float | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens = {self.chunk_tokens}: must be >= 1")


def fused_linear_divergence(
    student: LinearHead,
    teacher: LinearHead | TopK | None,
    tokens: TokenTargets,
    spec: DivergenceSpec,
    topk: TopKSpec | None = None,
    options: FusedLinearOptions | None = None,
) -> tuple[Tensor, PerToken]:
    """Return sum_n token_weights[n] D_n + sft_weights[n] CE_n, from last hidden states and shards of the heads.

    D is the divergence of ``vocab_parallel_divergence``, or that of ``topk_divergence``; CE is the cross-entropy at
    temperature 1 over the whole true vocabulary. All ranks of the group pass the same tokens. There are two collectives
    per chunk in forward (one for KL divergences; one or two more with a top-k) and none in backward.

    Args:
        student: hidden states and head, of one float dtype.
        teacher: hidden states and head of the same dtype, or the ``TopK`` [N, k] of a teacher whose hidden states are
            not known. None leaves only the cross-entropy. The teacher gets no gradient.
        tokens: weights and labels.
        spec: the divergence, and the ranks that share the vocabulary.
        topk: compare only the teacher's k most likely tokens. A teacher given as a ``TopK`` is used as it is, with the
            tail mode of `topk`. None compares all tokens that the teacher gives.
        options: chunk size and the gradient of the total.

    Returns:
        The total, a scalar of fp32 (fp64 for fp64), and the metrics of each token.

        The gradient of `student.hidden` is PARTIAL: that of this rank's columns. The caller has to sum it over the
        group, as Megatron's mappings do in their backward (copy to the tensor-parallel region, or gather from the
        sequence-parallel region). The gradients of the student's weight and bias are complete, and accumulated in fp32;
        where Megatron has set a `main_grad`, they go there (``HeadGradient``). Only these gradients are saved for
        backward.

    Raises:
        ValueError: shapes or dtypes do not agree, or a parameter is out of range.
    """
    topk_spec = topk or TopKSpec()
    _check(student, teacher, tokens)
    shard_spec = spec.on_shard(student.head.weight.shape[0], student.head.largest_logit)
    if topk_spec.k is not None and isinstance(teacher, LinearHead):
        check_k(topk_spec.k, shard_spec.shard)
    flat = teacher.flatten() if isinstance(teacher, TopK) else teacher
    plan = _Plan(student, flat, tokens, shard_spec, topk_spec, options or FusedLinearOptions())
    head = student.head
    total, metrics = _FusedLinear.apply(student.hidden, head.weight, head.bias, plan, torch.is_grad_enabled())
    return total, PerToken(*metrics.unbind(-1))


def _check(student: LinearHead, teacher: LinearHead | TopK | None, tokens: TokenTargets) -> None:
    count, width = student.hidden.shape[0], student.head.weight.shape[0]
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, LinearHead):
            continue
        hidden_size, head = model.hidden.shape[-1], model.head
        parts = {"hidden": (model.hidden, [count, hidden_size]), "weight": (head.weight, [width, hidden_size])}
        if head.bias is not None:
            parts["bias"] = head.bias, [width]
        for part, (tensor, shape) in parts.items():
            if tensor.dtype != student.hidden.dtype or list(tensor.shape) != shape:
                expected = f"{student.hidden.dtype} {shape}"
                raise ValueError(f"{name}.{part} = {tensor.dtype} {list(tensor.shape)}: must be {expected}")
    if isinstance(teacher, TopK) and teacher.ids.shape[:-1].numel() != count:
        raise ValueError(f"teacher = TopK {list(teacher.ids.shape)}: must be of {count} tokens, as student.hidden is")
    if tokens.sft_weights is not None and tokens.labels is None:
        raise ValueError("sft_weights: given without labels; the cross-entropy needs labels")
    for name in ("token_weights", "labels", "sft_weights"):
        tensor = getattr(tokens, name)
        if tensor is not None and tensor.shape != (count,):
            raise ValueError(f"{name} = {list(tensor.shape)}: must be {[count]}, one for each token")


@dataclass(frozen=True)
class _Plan:
    student: LinearHead
    teacher: LinearHead | TopK | None
    tokens: TokenTargets
    spec: ShardSpec
    topk: TopKSpec
    options: FusedLinearOptions

    @property
    def gradient_factor(self) -> float:
        """The factor of all gradients: that of the total where it is known, and the scale of the student's logits."""
        upstream = self.options.upstream
        return self.student.head.scale * (1.0 if upstream is None else upstream)

    def chunks(self) -> list[slice]:
        """Return as few chunks as `chunk_tokens` allows, of sizes that differ by one at most."""
        tokens = len(self.tokens.token_weights)
        count = -(-tokens // self.options.chunk_tokens)
        return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]

    def targets(self, chunk: slice, dtype: torch.dtype) -> ChunkTargets:
        """Return the targets of a chunk, with weights in `dtype`."""
        weights, labels, sft_weights = self.tokens.token_weights[chunk].to(dtype), self.tokens.labels, None
        labels = None if labels is None else labels[chunk]
        if labels is not None and self.tokens.sft_weights is not None:
            sft_weights = torch.where(labels == IGNORED_LABEL, 0, self.tokens.sft_weights[chunk].to(dtype))
        return ChunkTargets(weights, labels, sft_weights)


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        upstream = plan.options.upstream
        needs_hidden, needs_weight, needs_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[:3])
        gradients = LinearGradients(
            torch.empty_like(hidden) if needs_hidden else None,
            HeadGradient.from_weight(weight, upstream is not None) if needs_weight else None,
            HeadGradient.from_weight(bias, upstream is not None) if needs_bias and bias is not None else None,
        )
        total, metrics = _run(plan, gradients)
        ctx.of_head = gradients.weight, gradients.bias
        ctx.save_for_backward(gradients.hidden, *(None if one is None else one.buffer for one in ctx.of_head))
        ctx.upstream = upstream
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _metrics: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, *buffers = ctx.saved_tensors
        factor = upstream if ctx.upstream is None else None  # a known gradient is already a factor of all
        if ctx.upstream is not None:
            torch._assert_async((upstream == ctx.upstream).all(), "the gradient of the total is not `upstream`")
        weight_gradient, bias_gradient = (
            None if gradient is None else gradient.finish(buffer, factor)
            for gradient, buffer in zip(ctx.of_head, buffers, strict=True)
        )
        if hidden_gradient is not None and factor is not None:
            hidden_gradient = hidden_gradient * factor
        return hidden_gradient, weight_gradient, bias_gradient, None, None


def _run(plan: _Plan, gradients: LinearGradients) -> tuple[Tensor, Tensor]:
    """Return the total and the metrics [N, ...], and write the gradients that are needed."""
    hidden, valid = plan.student.hidden, plan.spec.shard.valid
    accumulate = accumulate_dtype(hidden.dtype)
    student_head = _ChunkedHead(plan.student, valid, plan.chunks())
    teacher_head = None
    if isinstance(plan.teacher, LinearHead):
        teacher_head = _ChunkedHead(plan.teacher, valid, plan.chunks())
    factor = plan.gradient_factor

    total = torch.zeros((), dtype=accumulate, device=hidden.device)
    metrics = torch.zeros(len(hidden), len(PerToken._fields), dtype=accumulate, device=hidden.device)
    for chunk in plan.chunks():
        student_nV = student_head.logits(chunk)
        teacher_nV = None if teacher_head is None else teacher_head.logits(chunk)
        targets = plan.targets(chunk, accumulate)
        scaled = targets if factor == 1 else targets.scaled(factor)
        found = _chunk_loss(plan, chunk, student_nV, teacher_nV, scaled, gradients.is_needed)
        total += weighted(targets.token_weights, found.divergence).sum()
        if targets.label_weights is not None:
            total += weighted(targets.label_weights, found.cross_entropy).sum()
        torch.stack(found, -1, out=metrics[chunk])
        gradients.add(chunk, student_nV, hidden, plan.student.head.weight)
    return total, metrics


class _ChunkedHead:
    """Compute the logits of chunks of tokens into one buffer. Padding rows of the weight are never multiplied."""

    def __init__(self, model: LinearHead, valid: int, chunks: list[slice]) -> None:
        self.hidden, self.head = model.hidden, model.head.rows(valid)
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        self._buffer = model.hidden.new_empty(rows, valid)

    def logits(self, chunk: slice) -> Tensor:
        """Return the logits of a chunk; they are overwritten by those of the next one."""
        hidden = self.hidden[chunk]
        return self.head.compute_logits(hidden, out=self._buffer[: len(hidden)])


def _chunk_loss(
    plan: _Plan,
    chunk: slice,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    targets: ChunkTargets,
    needs_gradient: bool,
) -> PerToken:
    topk_spec = TopKShardSpec(plan.spec, plan.topk.tail_mode)
    topk = plan.teacher[chunk] if isinstance(plan.teacher, TopK) else None
    if plan.topk.k is not None and teacher_nV is not None:
        temperature = plan.spec.temperature if topk_spec.has_bucket else None
        topk = choose_topk(teacher_nV, plan.topk.k, plan.spec.shard, temperature)
    if topk is not None:
        return compute_topk_loss(student_nV, topk, targets, topk_spec, needs_gradient, buffer_nV=teacher_nV)
    if teacher_nV is None:
        return compute_student_loss(student_nV, targets, plan.spec, needs_gradient)
    return compute_full_loss(student_nV, teacher_nV, targets, plan.spec, needs_gradient)

"""The language-model heads and the loss in one op, over chunks of tokens.

The op holds the logits of one chunk at a time, of this rank's vocabulary shard, of each model. For each chunk: the
logits of both models (two matrix products into reused [C, V/TP] buffers), the statistics, the gradient in place of the
student's logits, and from it the gradients of hidden states and head (two more products). Where ranks share the
vocabulary, these two run while the next chunk's collectives are under way, and the student has a second buffer
(``chunking``). The gradient is thus computed in the forward pass, for a total that enters the loss linearly; backward
only scales it. This is the scheme of Liger Kernel's fused linear losses (arXiv:2410.10989), over a sharded vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.ops.chunk_loss import compute_full_loss, compute_student_loss, compute_topk_loss
from megatron_gkd.ops.chunking import ChunkedHead, Chunking
from megatron_gkd.ops.head_gradient import DeferredProducts, HeadGradient, LinearGradients
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.params import ChunkTargets, PerToken, TokenResults
from megatron_gkd.ops.spec import DivergenceSpec, ShardSpec, TopKShardSpec, TopKSpec, accumulate_dtype
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_choice import check_k, choose_topk


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
        chunk_tokens: most tokens of a chunk. None: as many as fit into 2 GiB (on a CPU 1 GiB) for the logits of both
            models together, with all buffers that exist at once.
        upstream: the gradient of the total that backward will pass (Megatron's loss scale), where it is known before;
            another value in backward is an error. A `main_grad` of the student's weight then receives the gradient
            chunk by chunk, without a [V/TP, H] buffer beside it. If None, it receives the gradient in backward.
    """

    chunk_tokens: int | None = None
    upstream: float | None = None

    def __post_init__(self) -> None:
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
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
    per chunk in forward (one for KL divergences over all tokens; three where a top-k is chosen) and none in backward.

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

    def targets(self, dtype: torch.dtype) -> ChunkTargets:
        """Return the targets of all tokens, with weights in `dtype`."""
        tokens = self.tokens
        weights, sft_weights = (
            None if one is None else one.to(dtype).contiguous() for one in (tokens.token_weights, tokens.sft_weights)
        )
        labels = None if tokens.labels is None else tokens.labels.contiguous()
        return ChunkTargets(weights, labels, sft_weights, self.gradient_factor)

    def chunking(self, may_overlap: bool) -> Chunking:
        """Return how the tokens are divided, alike on all ranks of the group."""
        group, models = self.spec.shard.group, 1 + isinstance(self.teacher, LinearHead)
        may_overlap = may_overlap and group is not None and group.size() > 1
        chunk_tokens = self.options.chunk_tokens
        # The width is the same on all ranks, which need the same chunks; the number of valid columns is not.
        return Chunking.choose(
            self.student.hidden, self.spec.shard.width, models, chunk_tokens, may_overlap=may_overlap
        )


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
    chunking = plan.chunking(gradients.is_needed)
    student_head = ChunkedHead(*plan.student, valid, chunking.chunks, buffers=1 + chunking.is_overlapped)
    teacher_head = None
    if isinstance(plan.teacher, LinearHead):
        teacher_head = ChunkedHead(*plan.teacher, valid, chunking.chunks)
    targets, results = plan.targets(accumulate_dtype(hidden.dtype)), TokenResults.empty(hidden, has_losses=True)
    deferred = DeferredProducts()
    spec = plan.spec.overlapping(deferred.run_next) if chunking.is_overlapped else plan.spec
    for chunk in chunking.chunks:
        student_nV = student_head.logits(chunk)
        teacher_nV = None if teacher_head is None else teacher_head.logits(chunk)
        of_chunk = targets[chunk], results.rows(chunk)
        _compute_chunk(plan, chunk, student_nV, teacher_nV, *of_chunk, spec, gradients.is_needed)
        deferred.run_all()  # those of the chunk before that no collective has waited for
        deferred.extend(gradients.products(chunk, student_nV, hidden, plan.student.head.weight))
        if not chunking.is_overlapped:
            deferred.run_all()
    deferred.run_all()
    gradients.complete()
    for head in (student_head, teacher_head):
        if head is not None:
            head.release()
    assert results.losses is not None
    return results.losses.sum(), results.metrics


def _compute_chunk(
    plan: _Plan,
    tokens: slice,
    student_nV: Tensor,
    teacher_nV: Tensor | None,
    targets: ChunkTargets,
    results: TokenResults,
    spec: ShardSpec,
    needs_gradient: bool,
) -> None:
    topk_spec = TopKShardSpec(spec, plan.topk.tail_mode)
    topk = plan.teacher[tokens] if isinstance(plan.teacher, TopK) else None
    if plan.topk.k is not None and teacher_nV is not None:
        temperature = spec.temperature if topk_spec.has_bucket else None
        topk = choose_topk(teacher_nV, plan.topk.k, spec.shard, temperature)
    if topk is not None:
        compute_topk_loss(student_nV, topk, targets, results, topk_spec, needs_gradient)
    elif teacher_nV is None:
        compute_student_loss(student_nV, targets, results, spec, needs_gradient)
    else:
        compute_full_loss(student_nV, teacher_nV, targets, results, spec, needs_gradient)

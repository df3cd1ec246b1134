"""The language-model heads and the loss in one op, over chunks of tokens: a microbatch's logits never exist as a whole.

For each chunk of C tokens: logits of both models (two matrix products into two reused [C, V/TP] buffers), statistics,
the gradient in place of the student's logits, and from it the gradients of hidden states and head (two more products).
The gradient is thus made in the forward pass, for a total that enters the loss linearly; backward only scales it.
The scheme is that of Liger Kernel's fused linear losses (arXiv:2410.10989), here sharded over the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.ops.chunk_loss import ChunkWeights, PerToken, full_loss, student_loss, topk_loss
from megatron_gkd.ops.head_gradient import HeadGradient
from megatron_gkd.ops.normalizers import IGNORED_LABEL
from megatron_gkd.ops.pointwise import weighted
from megatron_gkd.ops.spec import DivergenceSpec, accumulate_dtype
from megatron_gkd.ops.topk import TopK, check_k, choose_topk
from megatron_gkd.ops.topk_statistics import TailMode, TopKSpec
from megatron_gkd.ops.vocabulary import VocabShard

DEFAULT_CHUNK_TOKENS = 1024


def fused_linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    beta: float,
    temperature: float,
    token_weights: Tensor,
    divergence: str = "jsd",
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    labels: Tensor | None = None,
    sft_weights: Tensor | None = None,
    topk: int | TopK | None = None,
    tail_mode: TailMode = "renormalize",
    chunk_tokens: int | None = None,
    upstream: float | None = None,
) -> tuple[Tensor, PerToken]:
    """sum_n token_weights[n] D_n + sft_weights[n] CE_n from last hidden states and head shards.

    D is the divergence of ``vocab_parallel_divergence``, or with `topk` that of ``topk_divergence``; CE is the
    untempered cross-entropy over the whole true vocabulary. All ranks of `group` pass the same tokens. Two collectives
    a chunk in forward (one for KL divergences; one or two more with `topk`), none in backward.

    Args:
        student_hidden, teacher_hidden: [N, H_S], [N, H_T], whole on every rank of the group. No teacher (None for its
            hidden states and weight, and no ``TopK``) leaves the cross-entropy only.
        student_weight, teacher_weight: [V/TP, H_S], [V/TP, H_T]: the heads' rows for the same global ids. All four
            tensors have one float type. The teacher never gets a gradient.
        token_weights: fp32 [N]; a token of weight 0 adds exactly 0, whatever its divergence.
        divergence, group, vocab_size: as for ``vocab_parallel_divergence``.
        labels: int64 [N], global ids, -100 for none; needed for the cross-entropy. An id outside the true vocabulary
            gives an infinite one.
        sft_weights: fp32 [N]; None leaves the cross-entropy out of the total, a statistic only.
        topk: how many of the teacher's most likely tokens count, None for all; or a ``TopK`` of [N, k] that a teacher
            without hidden states knows.
        tail_mode: what becomes of the others; see ``topk_divergence``.
        chunk_tokens: most rows of logits alive at once, of each model; 1024 if None. Chunks are of equal size, give or
            take one.
        upstream: the gradient that backward will be called with, where the caller knows it (Megatron's loss scale). A
            `student_weight.main_grad` then takes the weight's gradient as it is made, and no [V/TP, H_S] buffer exists
            beside it. Without it `main_grad` takes it in backward. Another value in backward is an error.

    Returns:
        The total, a scalar of fp32 (fp64 for fp64), and the statistics of each token.

        The gradient of `student_hidden` is this rank's PARTIAL one, from its own columns: the caller has to sum it over
        `group`, as Megatron's mappings do in their backward (copy to the tensor-parallel region, or gather from the
        sequence-parallel region). That of `student_weight` is whole; it is accumulated in fp32. Where Megatron has
        given the weight a `main_grad` it goes there, by Megatron's protocol (``HeadGradient``).
        For backward the op keeps these two gradients and nothing else.

    Raises:
        ValueError: shapes or types that don't agree, or a parameter out of range.
    """
    inputs = _Inputs(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        token_weights,
        labels,
        sft_weights,
        topk.flatten() if isinstance(topk, TopK) else None,
    )
    inputs.check()
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; allowed are values from 1")
    width = student_weight.shape[0]
    spec = DivergenceSpec.of(beta, temperature, VocabShard.of(width, group, vocab_size), divergence)
    k = None
    if isinstance(topk, int):
        check_k(topk, spec.shard)
        k = topk if teacher_hidden is not None else None
    topk_spec = None
    if topk is not None:
        topk_spec = TopKSpec.of(
            width,
            beta=beta,
            temperature=temperature,
            group=group,
            vocab_size=vocab_size,
            tail_mode=tail_mode,
            divergence=divergence,
        )
    plan = _Plan(inputs, spec, topk_spec, k, chunk_tokens or DEFAULT_CHUNK_TOKENS, upstream)
    total, statistics = _FusedLinear.apply(student_hidden, student_weight, plan, torch.is_grad_enabled())
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
    topk: TopK | None

    def check(self) -> None:
        tokens, width = self.student_hidden.shape[0], self.student_weight.shape[0]
        if (self.teacher_hidden is None) != (self.teacher_weight is None):
            raise ValueError("teacher_hidden and teacher_weight must both be given, or neither")
        if self.topk is not None and self.teacher_hidden is not None:
            raise ValueError("a TopK takes the place of teacher_hidden and teacher_weight; only one can be given")
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
        if self.topk is not None and len(self.topk.ids) != tokens:
            raise ValueError(f"topk is for {len(self.topk.ids)} tokens; student_hidden has {tokens}")


@dataclass(frozen=True)
class _Plan:
    inputs: _Inputs
    spec: DivergenceSpec
    topk_spec: TopKSpec | None
    k: int | None  # to be chosen from the teacher's logits
    chunk_tokens: int
    upstream: float | None

    def chunks(self) -> list[slice]:
        """As few as `chunk_tokens` allows, of sizes that differ by one at most."""
        tokens = len(self.inputs.token_weights)
        count = -(-tokens // self.chunk_tokens)
        return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


class _FusedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, student_hidden: Tensor, student_weight: Tensor, plan: _Plan, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        needs_hidden, needs_weight = (grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(student_hidden) if needs_hidden else None
        head_gradient = HeadGradient.of(student_weight, plan.upstream is not None) if needs_weight else None
        total, statistics = _run(plan, hidden_gradient, head_gradient)
        buffer = None if head_gradient is None else head_gradient.buffer
        ctx.save_for_backward(hidden_gradient, buffer)
        ctx.head_gradient, ctx.upstream = head_gradient, plan.upstream
        ctx.mark_non_differentiable(statistics)
        return total, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, _statistics: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, buffer = ctx.saved_tensors
        if ctx.upstream is not None:  # which the gradients have in them already
            torch._assert_async((upstream == ctx.upstream).all(), "the gradient of the total is not `upstream`")
            upstream = None
        weight_gradient = None if ctx.head_gradient is None else ctx.head_gradient.finish(buffer, upstream)
        if hidden_gradient is not None and upstream is not None:
            hidden_gradient = hidden_gradient * upstream
        return hidden_gradient, weight_gradient, None, None


def _run(plan: _Plan, hidden_gradient: Tensor | None, head_gradient: HeadGradient | None) -> tuple[Tensor, Tensor]:
    """The total and the statistics [N, ...]; fills the gradients that are wanted."""
    inputs, spec = plan.inputs, plan.spec
    hidden, valid = inputs.student_hidden, spec.shard.valid
    accumulate = accumulate_dtype(hidden.dtype)
    student_weight = inputs.student_weight[:valid]  # the head's padding is never multiplied
    teacher_weight = None if inputs.teacher_weight is None else inputs.teacher_weight[:valid]
    needs_gradient = hidden_gradient is not None or head_gradient is not None

    total = torch.zeros((), dtype=accumulate, device=hidden.device)
    statistics = torch.zeros(len(hidden), len(PerToken._fields), dtype=accumulate, device=hidden.device)
    chunks = plan.chunks()
    rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
    student_buffer = hidden.new_empty(rows, valid)
    teacher_buffer = None if teacher_weight is None else hidden.new_empty(rows, valid)
    for chunk in chunks:
        student = _logits(hidden[chunk], student_weight, student_buffer)
        teacher = None
        if teacher_weight is not None:
            teacher = _logits(inputs.teacher_hidden[chunk], teacher_weight, teacher_buffer)
        weights = _weights(inputs, chunk, accumulate)
        scaled = weights if plan.upstream is None else weights.times(plan.upstream)
        found = _chunk_loss(plan, student, teacher, chunk, scaled, needs_gradient)
        total += weighted(weights.divergence, found.divergence).sum()
        if weights.cross_entropy is not None:
            total += weighted(weights.cross_entropy, found.cross_entropy).sum()
        torch.stack(found, -1, out=statistics[chunk])
        if hidden_gradient is not None:
            torch.mm(student, student_weight, out=hidden_gradient[chunk])
        if head_gradient is not None:
            head_gradient.add(student, hidden[chunk])
    return total, statistics


def _logits(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out=buffer[: len(hidden)])


def _weights(inputs: _Inputs, chunk: slice, dtype: torch.dtype) -> ChunkWeights:
    divergence = inputs.token_weights[chunk].to(dtype)
    if inputs.sft_weights is None:
        return ChunkWeights(divergence, None)
    ignored = inputs.labels[chunk] == IGNORED_LABEL
    return ChunkWeights(divergence, torch.where(ignored, 0, inputs.sft_weights[chunk].to(dtype)))


def _chunk_loss(
    plan: _Plan, student: Tensor, teacher: Tensor | None, chunk: slice, weights: ChunkWeights, needs_gradient: bool
) -> PerToken:
    inputs, spec = plan.inputs, plan.spec
    labels = None if inputs.labels is None else inputs.labels[chunk]
    topk = None if inputs.topk is None else inputs.topk[chunk]
    if plan.k is not None:
        temperature = spec.temperature if plan.topk_spec.bucket else None
        topk = choose_topk(teacher, plan.k, spec.shard, temperature)
    if topk is not None:
        return topk_loss(student, topk, labels, weights, spec, plan.topk_spec, needs_gradient, scratch_nV=teacher)
    if teacher is None:
        return student_loss(student, labels, weights, spec, needs_gradient)
    return full_loss(student, teacher, labels, weights, spec, needs_gradient)

"""The divergence of materialised logits, sharded over the vocabulary, with its closed-form gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.ops.statistics import DivergenceSpec, Normalizer, Normalizers, Weights, measure, write_gradient
from megatron_gkd.ops.vocabulary import VocabShard


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The generalized Jensen-Shannon divergence of each token, in nats; forward KL at beta 0, reverse KL at beta 1.

    Agarwal et al., arXiv:2306.13649, equation 1, with both distributions at `temperature` and no T² factor. Autograd
    through a plain all_reduce would drop the other shards' terms; the gradient here is the closed form
    (slope_j - p_j sum_u slope_u) / temperature (``reference.Divergence``), with sums over the whole vocabulary.

    Args:
        student_logits, teacher_logits: [..., V/TP] of one float type: this rank's columns. -inf excludes an entry.
            The teacher never gets a gradient.
        beta: in [0, 1].
        group: the ranks that share the vocabulary, in equal shards in rank order; None where it is not sharded.
        vocab_size: the true size over the group (default: all columns). Columns past it are padding: they don't count,
            and their gradient is 0.
        mask: bool [...], True for the tokens that count.

    Returns:
        [...] in fp32 (fp64 for fp64), the same bits on every rank of the group; exactly 0 where masked.
        For backward it keeps the inputs and five numbers a token. Two collectives in forward, none in backward.

    Raises:
        ValueError: inputs of unequal shape or type, or a parameter out of range.
    """
    if student_logits.shape != teacher_logits.shape or student_logits.dtype != teacher_logits.dtype:
        raise ValueError(
            f"student_logits are {student_logits.dtype} {list(student_logits.shape)}, teacher_logits "
            f"{teacher_logits.dtype} {list(teacher_logits.shape)}; both must have one type and shape"
        )
    if not student_logits.is_floating_point() or student_logits.dim() == 0:
        raise ValueError(f"logits are {student_logits.dtype} {list(student_logits.shape)}; allowed are floats [..., V]")
    tokens, width = student_logits.shape[:-1], student_logits.shape[-1]
    if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens):
        raise ValueError(f"mask is {mask.dtype} {list(mask.shape)}; it must be torch.bool {list(tokens)}")
    spec = DivergenceSpec.of(beta, temperature, VocabShard.of(width, group, vocab_size))
    per_token = _Divergence.apply(
        student_logits.reshape(-1, width),
        teacher_logits.detach().reshape(-1, width),
        None if mask is None else mask.reshape(-1),
        spec,
    )
    return per_token.view(tokens)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, mask: Tensor | None, spec: DivergenceSpec) -> Tensor:
        valid = spec.shard.valid
        normalizers, sums = measure(student[:, :valid], teacher[:, :valid], None, spec)
        ctx.spec = spec
        ctx.save_for_backward(
            student,
            teacher,
            mask,
            normalizers.student.maximum,
            normalizers.student.log_sum,
            normalizers.teacher.maximum,
            normalizers.teacher.log_sum,
            sums.slope,
        )
        return sums.value if mask is None else torch.where(mask, sums.value, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        student, teacher, mask, *normalizers, slope_sum = ctx.saved_tensors
        valid = ctx.spec.shard.valid
        gradient = torch.empty_like(student)
        gradient[:, valid:] = 0
        write_gradient(
            gradient[:, :valid],
            student[:, :valid],
            teacher[:, :valid],
            Normalizers(Normalizer(*normalizers[:2]), Normalizer(*normalizers[2:])),
            slope_sum,
            Weights(divergence=upstream if mask is None else torch.where(mask, upstream, 0)),
            ctx.spec,
        )
        return gradient, None, None, None

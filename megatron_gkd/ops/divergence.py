"""The divergence of materialised logits, sharded over the vocabulary, with its closed-form gradient.

Registered with torch.library: to torch.compile it is one opaque operator, collectives included, with an operator of its
own for the gradient.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.measure import measure
from megatron_gkd.ops.normalizers import Normalizers, TokenStatistics
from megatron_gkd.ops.spec import DivergenceSpec, accumulate_dtype
from megatron_gkd.ops.vocabulary import VocabShard, group_of_name, name_of_group


def vocab_parallel_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    divergence: str = "jsd",
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
    return_statistics: bool = False,
) -> Tensor | tuple[Tensor, TokenStatistics]:
    """The divergence of each token, in nats; by default the generalized Jensen-Shannon divergence.

    Agarwal et al., arXiv:2306.13649, equation 1, with both distributions at `temperature` and no T² factor; forward KL
    at beta 0, reverse KL at beta 1. Autograd through a plain all_reduce would drop the other shards' terms; the
    gradient here is the closed form (slope_j - p_j sum_u slope_u) / temperature (``reference.Divergence``), with sums
    over the whole vocabulary.

    Args:
        student_logits, teacher_logits: [..., V/TP] of one float type: this rank's columns. -inf excludes an entry.
            The teacher never gets a gradient.
        beta: in [0, 1].
        divergence: a name of ``reference.FAMILIES``, whose formulas say what `beta` means to it.
        group: the ranks that share the vocabulary, in equal shards in rank order; None where it is not sharded.
        vocab_size: the true size over the group (default: all columns). Columns past it are padding: they don't count,
            and their gradient is 0.
        mask: bool [...], True for the tokens that count. Others are not read.
        return_statistics: also return what falls out beside the loss.

    Returns:
        [...] in fp32 (fp64 for fp64), the same bits on every rank of the group; exactly 0 where masked. With
        `return_statistics` also a ``TokenStatistics`` of the same shapes, detached.
        For backward it keeps the inputs and 16 bytes a token. One collective in forward for the KL divergences, two for
        the others, none in backward.

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
    shard = VocabShard.of(width, group, vocab_size)
    DivergenceSpec.of(beta, temperature, shard, divergence)  # for its errors
    value, _, _, _, statistics = _forward(
        student_logits.reshape(-1, width),
        teacher_logits.detach().reshape(-1, width),
        None if mask is None else mask.reshape(-1).contiguous(),
        divergence,
        float(beta),
        float(temperature),
        shard.vocab_size,
        name_of_group(group),
        return_statistics,
    )
    value = value.view(tokens)
    if not return_statistics:
        return value
    return value, TokenStatistics(*(x.view(tokens) for x in statistics.detach().unbind()))


def _spec(width: int, divergence: str, beta: float, temperature: float, vocab_size: int, group: str) -> DivergenceSpec:
    return DivergenceSpec.of(beta, temperature, VocabShard.of(width, group_of_name(group), vocab_size), divergence)


def _rows_contiguous(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


@torch.library.custom_op("megatron_gkd::vocab_parallel_divergence", mutates_args=())
def _forward(
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
    """Of N tokens: the divergence [N], what backward needs (shifts [N, 2], biases [N, 2], slope sum [N]), and the
    statistics [5, N], or [5, 0] where nobody wants them.
    """
    spec = _spec(student.shape[1], divergence, beta, temperature, vocab_size, group)
    student, teacher = (_rows_contiguous(x)[:, : spec.shard.valid] for x in (student, teacher))
    found = measure(student, teacher, spec, mask=mask, moments=return_statistics)
    value = found.divergence.clone() if mask is None else torch.where(mask, found.divergence, 0)
    statistics = torch.stack(found.statistics) if return_statistics else value.new_empty(5, 0)
    return value, found.normalizers.shifts, found.normalizers.biases, found.slope_sum, statistics


@_forward.register_fake
def _(student, teacher, mask, divergence, beta, temperature, vocab_size, group, return_statistics):
    rows, dtype = student.shape[0], accumulate_dtype(student.dtype)
    value = student.new_empty(rows, dtype=dtype)
    return (
        value,
        student.new_empty(rows, 2, dtype=dtype),
        student.new_empty(rows, 2, dtype=torch.bfloat16),
        torch.empty_like(value),
        student.new_empty(5, rows if return_statistics else 0, dtype=dtype),
    )


@torch.library.custom_op("megatron_gkd::vocab_parallel_divergence_backward", mutates_args=())
def _backward(
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
    """The student's gradient [N, V/TP]."""
    spec = _spec(student.shape[1], divergence, beta, temperature, vocab_size, group)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    student, teacher = (_rows_contiguous(x)[:, : spec.shard.valid] for x in (student, teacher))
    weight = upstream if mask is None else torch.where(mask, upstream, 0)
    normalizers = Normalizers(shifts, biases).packed()
    passes.gradient(gradient, student, teacher, normalizers, slope_sum, weight.contiguous(), spec)
    return gradient


@_backward.register_fake
def _(upstream, student, *_):
    return torch.empty(student.shape, dtype=student.dtype, device=student.device)


def _setup_context(ctx, inputs, output) -> None:
    student, teacher, mask, *ctx.parameters, _ = inputs
    _, shifts, biases, slope_sum, _ = output
    ctx.save_for_backward(student, teacher, mask, shifts, biases, slope_sum)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, upstream: Tensor | None, *_):
    gradient = None if upstream is None else _backward(upstream, *ctx.saved_tensors, *ctx.parameters)
    return gradient, None, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_setup_context)

"""The three passes over a block of logits that make up every loss here, in plain torch.

    local_statistics   one read of the logits: maximum, sum of exponentials, ...   then one collective -> ``combine``
    local_sums         one read: value, slope, entropies                           then one collective -> ``total_sums``
    write_gradient     one read, one write, no collective

What passes between them is a handful of numbers a token. Compiled kernels take the place of these three functions.
Shape suffixes: N tokens, V valid columns of this rank's vocabulary shard, R ranks of its group. Logits are of any float
type; all arithmetic and all statistics are in fp32 (fp64 for fp64 logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops.pointwise import Pointwise, pointwise_divergence, weighted
from megatron_gkd.ops.vocabulary import VocabShard

IGNORED_LABEL = -100
# Rows are taken in blocks, which bounds the temporaries of a pass whatever N is: about 1 MiB each in fp32, so that they
# stay in a CPU's cache, but enough rows of a large vocabulary to keep a GPU busy.
BLOCK_ELEMENTS = 1 << 18
BLOCK_MIN_ROWS = 16


@dataclass(frozen=True)
class DivergenceSpec:
    """What all passes of one call share."""

    pointwise: Pointwise
    temperature: float
    shard: VocabShard

    @classmethod
    def of(cls, beta: float, temperature: float, shard: VocabShard) -> DivergenceSpec:
        """ValueError for a beta outside [0, 1] or a temperature that is not positive."""
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; allowed are values above 0")
        return cls(pointwise_divergence(beta), temperature, shard)


@dataclass(frozen=True)
class Normalizer:
    """What turns logits into log-probabilities: (z - maximum) / temperature - log_sum.

    The two are not added up to one log-sum-exp, so that large logits cost no digits.
    """

    maximum: Tensor  # [N]
    log_sum: Tensor  # [N], of exp((z - maximum) / temperature)

    def log_probs(self, z: Tensor, rows: slice, temperature: float = 1.0) -> Tensor:
        """[n, V] of the `rows` whose logits are `z`."""
        shifted = z.to(self.maximum.dtype) - self.maximum[rows, None]
        return shifted / temperature - self.log_sum[rows, None]


@dataclass(frozen=True)
class Normalizers:
    """The statistics of the whole vocabulary, the same bits on every rank of the group."""

    student: Normalizer  # tempered
    teacher: Normalizer | None  # tempered
    untempered: Normalizer | None = None  # the student's at temperature 1, where there are labels
    cross_entropy: Tensor | None = None  # [N], untempered, 0 where the label is ignored
    top1_agreement: Tensor | None = None  # [N], 1.0 where student and teacher have the same most likely token


@dataclass(frozen=True)
class Sums:
    """Sums over the whole vocabulary, each [N], of the tempered distributions; 0 for what takes an absent teacher."""

    value: Tensor
    slope: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor


@dataclass(frozen=True)
class Weights:
    """What each token counts in the loss, each [N] in the statistics' type."""

    divergence: Tensor
    cross_entropy: Tensor | None = None  # 0 where the label is ignored
    labels: Tensor | None = None  # int64, global ids


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _blocks(logits: Tensor) -> Iterator[slice]:
    rows, width = logits.shape
    step = max(BLOCK_MIN_ROWS, BLOCK_ELEMENTS // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


# ---- pass 1: normalizers


def local_statistics(
    student_NV: Tensor, teacher_NV: Tensor | None, labels: Tensor | None, spec: DivergenceSpec
) -> Tensor:
    """[N, 3 (+ 3 with a teacher) (+ 2 with labels)]: for each model its maximum, the sum of exponentials against that
    and its global id; then the student's untempered sum and the label's logit (-inf where another rank has it)."""
    columns = 3 + 3 * (teacher_NV is not None) + 2 * (labels is not None)
    rows, width = student_NV.shape
    statistics = torch.zeros(rows, columns, dtype=accumulate_dtype(student_NV.dtype), device=student_NV.device)
    if width == 0:  # all padding: no maximum, no mass, no label
        statistics[:, 0] = -torch.inf
        if teacher_NV is not None:
            statistics[:, 3] = -torch.inf
        if labels is not None:
            statistics[:, -1] = -torch.inf
        return statistics
    for block in _blocks(student_NV):
        shifted = _softmax_statistics(student_NV[block], spec, out=statistics[block, :3])
        if labels is not None:
            here, column = spec.shard.owned(labels[block])
            label_logit = student_NV[block].gather(1, column[:, None])[:, 0].to(statistics.dtype)
            statistics[block, -2] = shifted.exp().sum(-1)
            statistics[block, -1] = torch.where(here, label_logit, -torch.inf)
        if teacher_NV is not None:
            _softmax_statistics(teacher_NV[block], spec, out=statistics[block, 3:6])
    return statistics


def _softmax_statistics(logits: Tensor, spec: DivergenceSpec, out: Tensor) -> Tensor:
    """Fill out [n, 3]; return the logits less their maximum (-inf throughout where there is none)."""
    z = logits.to(out.dtype)
    maximum, column = z.max(-1)
    shifted = z - torch.where(maximum == -torch.inf, 0, maximum)[:, None]
    out[:, 0], out[:, 1], out[:, 2] = maximum, (shifted / spec.temperature).exp().sum(-1), column + spec.shard.first
    return shifted


def combine(gathered_RNK: Tensor, *, has_teacher: bool, labels: Tensor | None, spec: DivergenceSpec) -> Normalizers:
    """The ranks' ``local_statistics``, stacked in rank order, as statistics of the whole vocabulary."""
    maxima, sums, ids = gathered_RNK[..., :3].unbind(-1)
    student, student_top1 = _combine_softmax(maxima, sums, ids, spec.temperature)
    teacher = agreement = untempered = cross_entropy = None
    if has_teacher:
        teacher, teacher_top1 = _combine_softmax(*gathered_RNK[..., 3:6].unbind(-1), spec.temperature)
        agreement = (student_top1 == teacher_top1).to(gathered_RNK.dtype)
    if labels is not None:
        untempered, _ = _combine_softmax(maxima, gathered_RNK[..., -2], ids, temperature=1.0)
        label_logit = gathered_RNK[..., -1].amax(0)
        negative_log_prob = untempered.log_sum - (label_logit - untempered.maximum)
        cross_entropy = torch.where(labels == IGNORED_LABEL, 0, negative_log_prob)
    return Normalizers(student, teacher, untempered, cross_entropy, agreement)


def _combine_softmax(
    maxima_RN: Tensor, sums_RN: Tensor, ids_RN: Tensor, temperature: float
) -> tuple[Normalizer, Tensor]:
    maximum, winner = maxima_RN.max(0)  # ties go to the lower rank, so to the lower id
    total = (sums_RN * ((maxima_RN - maximum) / temperature).exp()).sum(0)
    return Normalizer(maximum, total.log()), ids_RN.gather(0, winner[None])[0]


# ---- pass 2: sums


def local_sums(student_NV: Tensor, teacher_NV: Tensor | None, normalizers: Normalizers, spec: DivergenceSpec) -> Tensor:
    """[N, 4]: this shard's part of the fields of ``Sums``."""
    partial = normalizers.student.maximum.new_zeros(student_NV.shape[0], 4)
    for block in _blocks(student_NV):
        a = normalizers.student.log_probs(student_NV[block], block, spec.temperature)
        p = a.exp()
        partial[block, 3] = -weighted(p, a).sum(-1)
        if teacher_NV is not None:
            b = normalizers.teacher.log_probs(teacher_NV[block], block, spec.temperature)
            q = b.exp()
            value, slope = spec.pointwise.terms(a, b, p, q)
            partial[block, 0], partial[block, 1] = value.sum(-1), slope.sum(-1)
            partial[block, 2] = -weighted(q, b).sum(-1)
    return partial


def total_sums(gathered_RN4: Tensor) -> Sums:
    """The ranks' ``local_sums``, stacked in rank order, added up."""
    return Sums(*gathered_RN4.sum(0).unbind(-1))


def measure(
    student_NV: Tensor, teacher_NV: Tensor | None, labels: Tensor | None, spec: DivergenceSpec
) -> tuple[Normalizers, Sums]:
    """Passes 1 and 2 with their two collectives: everything about these tokens but the gradient."""
    statistics = spec.shard.gather(local_statistics(student_NV, teacher_NV, labels, spec))
    normalizers = combine(statistics, has_teacher=teacher_NV is not None, labels=labels, spec=spec)
    sums = spec.shard.gather(local_sums(student_NV, teacher_NV, normalizers, spec))
    return normalizers, total_sums(sums)


# ---- pass 3: gradient


def write_gradient(
    out_NV: Tensor,
    student_NV: Tensor,
    teacher_NV: Tensor | None,
    normalizers: Normalizers,
    slope_sum: Tensor,
    weights: Weights,
    spec: DivergenceSpec,
) -> None:
    """Write ∂/∂z_S of sum_n (weights.divergence[n] D_n + weights.cross_entropy[n] CE_n) into `out_NV`, which may be
    `student_NV` itself. Rows of weight 0 become exactly 0, whatever they held."""
    for block in _blocks(student_NV):
        z = student_NV[block].to(slope_sum.dtype)
        gradient = torch.zeros_like(z)
        if teacher_NV is not None:
            a = normalizers.student.log_probs(z, block, spec.temperature)
            b = normalizers.teacher.log_probs(teacher_NV[block], block, spec.temperature)
            p = a.exp()
            _, slope = spec.pointwise.terms(a, b, p, b.exp())
            factor = weights.divergence[block, None] / spec.temperature
            gradient += torch.where(factor == 0, 0, (slope - p * slope_sum[block, None]) * factor)
        if weights.cross_entropy is not None:
            factor = weights.cross_entropy[block, None]
            p = normalizers.untempered.log_probs(z, block).exp()
            gradient += torch.where(factor == 0, 0, p * factor)
            here, column = spec.shard.owned(weights.labels[block])
            if z.shape[1]:
                gradient.scatter_add_(1, column[:, None], torch.where(here[:, None], -factor, 0))
        out_NV[block] = gradient

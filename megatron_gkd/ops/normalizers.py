"""From the ranks' statistics to the normalizers of the whole vocabulary, and to what falls out beside them.

A handful of numbers a token: all is worked out in fp64. Shape suffixes: R ranks, N tokens, C columns of
``csrc/params.h``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.ops.spec import LOG2_E, DivergenceSpec, round_to

LN2 = math.log(2)
IGNORED_LABEL = -100


class TokenStatistics(NamedTuple):
    """What is known of each token beside the loss, [N] of the tempered distributions, in nats."""

    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor  # KL(T||S)
    reverse_kl: Tensor  # KL(S||T)
    top1_agreement: Tensor  # 1 where both have the same most likely token, the lowest id counting among equals


@dataclass(frozen=True)
class Normalizers:
    """What turns logits into log-probabilities: log2 p = scale (z - shift) - bias, the same bits on all ranks.

    `shift` is the log-sum-exp in the logits' units and `bias` what its rounding lost, so that large logits cost no
    digits: a tiny number, for which bf16 is plenty.
    """

    shifts: Tensor  # [N, 2], of student and teacher
    biases: Tensor  # [N, 2], bf16

    def packed(self) -> Tensor:
        """[N, 4] as the passes take them: student's shift and bias, teacher's shift and bias."""
        return torch.stack([self.shifts, self.biases.to(self.shifts.dtype)], -1).flatten(1)


@dataclass(frozen=True)
class Combined:
    normalizers: Normalizers
    statistics: TokenStatistics | None  # where moments were taken
    untempered: Tensor | None  # [2, N]: the student's shift and bias at temperature 1
    cross_entropy: Tensor | None  # [N], untempered, 0 where the label is ignored


def combine(gathered_RNC: Tensor, spec: DivergenceSpec, *, moments: bool, labels: Tensor | None = None) -> Combined:
    """The ranks' statistics, stacked in rank order. With `labels` the last two columns are the untempered sum and the
    label's logit (-inf where another rank has it).
    """
    dtype = gathered_RNC.dtype
    scale, columns = spec.scale(dtype), gathered_RNC.double().unbind(-1)
    student, teacher = (_Model.of(columns[i], columns[i + 1], scale) for i in (0, 2))
    statistics = untempered = cross_entropy = None
    if moments:
        statistics = TokenStatistics(*(x.to(dtype) for x in _statistics(columns, student, teacher)))
    if labels is not None:
        at_one = _Model.of(columns[0], columns[-2], round_to(LOG2_E, dtype))
        shift, bias = at_one.normalizer(dtype)
        untempered = torch.stack([shift, bias.to(dtype)])
        label_logit = columns[-1].amax(0)
        negative_log_prob = LN2 * (at_one.log_sum - (label_logit - at_one.maximum) * at_one.scale)
        cross_entropy = torch.where(labels == IGNORED_LABEL, 0, negative_log_prob).to(dtype)
    (student_shift, student_bias), (teacher_shift, teacher_bias) = (x.normalizer(dtype) for x in (student, teacher))
    normalizers = Normalizers(
        torch.stack([student_shift, teacher_shift], -1), torch.stack([student_bias, teacher_bias], -1)
    )
    return Combined(normalizers, statistics, untempered, cross_entropy)


@dataclass(frozen=True)
class _Model:
    """One model's sums over the vocabulary, relative to its maximum over all ranks."""

    scale: float
    by_rank: Tensor  # [R, N], each rank's maximum
    maximum: Tensor  # [N]
    offsets: Tensor  # [R, N], in bits: how far each rank's reference lies below the maximum
    shrink: Tensor  # [R, N], 2^offsets
    sums: Tensor  # [R, N], each relative to its rank's reference
    total: Tensor  # [N]

    @classmethod
    def of(cls, maxima_RN: Tensor, sums_RN: Tensor, scale: float) -> _Model:
        maximum = maxima_RN.amax(0)
        references = torch.where(maxima_RN == -torch.inf, 0, maxima_RN)
        offsets = (references - maximum) * scale
        # A shard without a finite logit has no mass, whatever its offset is.
        shrink = torch.where(sums_RN == 0, 0, offsets.exp2())
        return cls(scale, maxima_RN, maximum, offsets, shrink, sums_RN, (shrink * sums_RN).sum(0))

    @property
    def log_sum(self) -> Tensor:
        return self.total.log2()

    def mean(self, sums_RN: Tensor, offsets_RN: Tensor) -> Tensor:
        """The mean over the distribution of a quantity, from sums in which it is less by `offsets`."""
        shifted = self.shrink * (sums_RN + offsets_RN * self.sums)
        return torch.where(self.shrink == 0, 0, shifted).sum(0) / self.total

    def normalizer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = self.maximum + self.log_sum / self.scale
        shift = exact.to(dtype)
        return shift, ((exact - shift.double()) * self.scale).bfloat16()

    def top(self, ids_RN: Tensor) -> Tensor:
        return torch.where(self.by_rank == self.maximum, ids_RN, torch.inf).amin(0)


def _statistics(columns: tuple[Tensor, ...], student: _Model, teacher: _Model) -> TokenStatistics:
    student_moment, student_gap, student_ids, teacher_moment, teacher_gap, teacher_ids = columns[4:10]
    between = student.offsets - teacher.offsets
    reverse = student.mean(student_gap, between) - student.log_sum + teacher.log_sum
    forward = teacher.mean(teacher_gap, -between) - teacher.log_sum + student.log_sum
    return TokenStatistics(
        student_entropy=LN2 * (student.log_sum - student.mean(student_moment, student.offsets)),
        teacher_entropy=LN2 * (teacher.log_sum - teacher.mean(teacher_moment, teacher.offsets)),
        forward_kl=(LN2 * forward).clamp(min=0),
        reverse_kl=(LN2 * reverse).clamp(min=0),
        top1_agreement=(student.top(student_ids) == teacher.top(teacher_ids)).to(student.total.dtype),
    )

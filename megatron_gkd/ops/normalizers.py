"""The normalizers of the whole vocabulary and the statistics of each token, from the statistics of the ranks.

These are a few numbers per token: all arithmetic is in fp64. Shape suffixes: R ranks, N tokens, C columns of
``csrc/params.h``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.ops.spec import LOG2_E, ShardSpec, round_to

LN2 = math.log(2)


class TokenStatistics(NamedTuple):
    """Hold statistics of each token, [N], of the distributions at the temperature of the loss, in nats.

    Attributes:
        student_entropy: the entropy of the student's distribution.
        teacher_entropy: the entropy of the teacher's distribution.
        forward_kl: KL(T||S).
        reverse_kl: KL(S||T).
        top1_agreement: 1 where both have the same most likely token (the lowest id among equals), else 0.
    """

    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agreement: Tensor


@dataclass(frozen=True)
class Normalizers:
    """Hold what turns logits z into log-probabilities: log2 p = scale (z - shift) - bias.

    All ranks have the same bits. The shift is the log-sum-exp in the logits' units. The bias is its rounding error, so
    that large logits lose no digits; it is so small that bf16 is enough.

    Attributes:
        shifts: [N, 2], of student and teacher.
        biases: bf16 [N, 2], of student and teacher.
    """

    shifts: Tensor
    biases: Tensor

    @classmethod
    def from_packed(cls, packed: Tensor) -> Normalizers:
        """Return the same as two tensors."""
        return cls(
            packed[:, ::2].contiguous(), packed[:, 1::2].to(torch.bfloat16, memory_format=torch.contiguous_format)
        )

    def packed(self) -> Tensor:
        """Return [N, 4] as the passes take them: student's shift and bias, teacher's shift and bias."""
        return torch.stack([self.shifts, self.biases.to(self.shifts.dtype)], -1).flatten(1)


class CrossEntropy(NamedTuple):
    """Hold the cross-entropy of each token at temperature 1, over the whole vocabulary.

    Attributes:
        value: [N], in nats; 0 where the label is ignored.
        normalizers: [2, N], shift and bias of the student at temperature 1.
    """

    value: Tensor
    normalizers: Tensor


def combine_cross_entropy(maxima_RN: Tensor, sums_RN: Tensor, label_logits_RN: Tensor, labels: Tensor) -> CrossEntropy:
    """Combine the ranks' statistics at temperature 1.

    Args:
        maxima_RN: each rank's largest logit.
        sums_RN: each rank's sum of exponentials, relative to its maximum.
        label_logits_RN: the label's logit on the rank that has it, -inf on the others.
        labels: int64 [N], global ids.
    """
    dtype = maxima_RN.dtype
    model = _Model.from_ranks(maxima_RN.double(), sums_RN.double(), round_to(LOG2_E, dtype))
    shift, bias = model.normalizer(dtype)
    negative_log_prob = LN2 * (model.log_sum - (label_logits_RN.double().amax(0) - model.maximum) * model.scale)
    value = torch.where(labels == IGNORED_LABEL, 0, negative_log_prob).to(dtype)
    return CrossEntropy(value, torch.stack([shift, bias.to(dtype)]))


def combine_student_entropy(gathered_RNC: Tensor, spec: ShardSpec) -> Tensor:
    """Return the student's entropy [N], in nats, from the ranks' ``passes.student_statistics``."""
    maxima, sums, moments = gathered_RNC[..., :3].double().unbind(-1)
    return _Model.from_ranks(maxima, sums, spec.scale(gathered_RNC.dtype)).entropy(moments).to(gathered_RNC.dtype)


class Combined:
    """Combine the ranks' ``passes.statistics``.

    Args:
        gathered_RNC: the statistics of all ranks, stacked in rank order.
        spec: the specification that they were computed with.
    """

    def __init__(self, gathered_RNC: Tensor, spec: ShardSpec) -> None:
        self._dtype = gathered_RNC.dtype
        self._columns = gathered_RNC.double().unbind(-1)
        scale = spec.scale(self._dtype)
        self._student, self._teacher = (
            _Model.from_ranks(self._columns[i], self._columns[i + 1], scale) for i in (0, 2)
        )

    def normalizers(self) -> Normalizers:
        """Return the normalizers of both models."""
        shifts, biases = zip(*(model.normalizer(self._dtype) for model in (self._student, self._teacher)), strict=True)
        return Normalizers(torch.stack(shifts, -1), torch.stack(biases, -1))

    def token_statistics(self) -> TokenStatistics:
        """Return the statistics of each token; needs moments among the ranks' statistics."""
        student, teacher = self._student, self._teacher
        student_moment, student_gap, student_ids, teacher_moment, teacher_gap, teacher_ids = self._columns[4:10]
        between = student.offsets - teacher.offsets
        reverse = student.mean(student_gap, between) - student.log_sum + teacher.log_sum
        forward = teacher.mean(teacher_gap, -between) - teacher.log_sum + student.log_sum
        statistics = TokenStatistics(
            student_entropy=student.entropy(student_moment),
            teacher_entropy=teacher.entropy(teacher_moment),
            forward_kl=(LN2 * forward).clamp(min=0),
            reverse_kl=(LN2 * reverse).clamp(min=0),
            top1_agreement=student.top(student_ids) == teacher.top(teacher_ids),
        )
        return TokenStatistics(*(x.to(self._dtype) for x in statistics))


@dataclass(frozen=True)
class _Model:
    """Hold one model's sums over the vocabulary, relative to its maximum over all ranks.

    Attributes:
        scale: turns logits into bits.
        maxima: [R, N], each rank's maximum.
        maximum: [N].
        offsets: [R, N], by how many bits each rank's reference is below the maximum, <= 0.
        shrink: [R, N], 2^offsets.
        sums: [R, N], each relative to its rank's reference.
        total: [N].
    """

    scale: float
    maxima: Tensor
    maximum: Tensor
    offsets: Tensor
    shrink: Tensor
    sums: Tensor
    total: Tensor

    @classmethod
    def from_ranks(cls, maxima_RN: Tensor, sums_RN: Tensor, scale: float) -> _Model:
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
        """Return the mean of a quantity over the distribution, from sums in which it is too small by `offsets`."""
        shifted = self.shrink * (sums_RN + offsets_RN * self.sums)
        return torch.where(self.shrink == 0, 0, shifted).sum(0) / self.total

    def entropy(self, moments_RN: Tensor) -> Tensor:
        """Return the entropy in nats, [N]."""
        return LN2 * (self.log_sum - self.mean(moments_RN, self.offsets))

    def normalizer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return shift and bias, [N]; see ``Normalizers``."""
        exact = self.maximum + self.log_sum / self.scale
        shift = exact.to(dtype)
        return shift, ((exact - shift.double()) * self.scale).bfloat16()

    def top(self, ids_RN: Tensor) -> Tensor:
        """Return the lowest id of the maximum over all ranks, [N]."""
        return torch.where(self.maxima == self.maximum, ids_RN, torch.inf).amin(0)

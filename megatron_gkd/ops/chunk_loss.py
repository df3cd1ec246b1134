"""The loss of one chunk of tokens from their logits: what is measured, and the gradient over the student's logits.

Against a teacher's logits, against its top-k, or against nobody. Shape suffixes: n tokens of the chunk, V valid columns
of this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.measure import Measured, measure
from megatron_gkd.ops.reference import FORWARD_KL
from megatron_gkd.ops.spec import DivergenceSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_statistics import TopKSpec, measure_topk, write_topk_gradient


class PerToken(NamedTuple):
    """What was measured at each token: detached, [N], fp32 (fp64 for fp64), the same bits on all ranks of the group.

    All but the cross-entropy is of the tempered distributions (over the top-k, where the divergence is), in nats, and 0
    for what takes an absent teacher.
    """

    divergence: Tensor
    cross_entropy: Tensor  # untempered, over the whole vocabulary; 0 without labels or where the label is -100
    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor  # KL(T||S)
    reverse_kl: Tensor  # KL(S||T)
    top1_agreement: Tensor  # 1.0 where both have the same most likely token


@dataclass(frozen=True)
class ChunkWeights:
    """What each token counts in the loss, [n] in the statistics' type."""

    divergence: Tensor
    cross_entropy: Tensor | None  # 0 where the label is ignored; None where the cross-entropy is a statistic only

    def times(self, factor: float) -> ChunkWeights:
        return ChunkWeights(
            self.divergence * factor, None if self.cross_entropy is None else self.cross_entropy * factor
        )


def full_loss(
    student_nV: Tensor,
    teacher_nV: Tensor,
    labels: Tensor | None,
    weights: ChunkWeights,
    spec: DivergenceSpec,
    needs_gradient: bool,
) -> PerToken:
    """Against the teacher's logits."""
    found = measure(student_nV, teacher_nV, spec, labels=labels, moments=True)
    if needs_gradient:
        _write_gradient(student_nV, teacher_nV, found, labels, weights, spec)
    return PerToken(
        found.divergence,
        torch.zeros_like(found.divergence) if labels is None else found.cross_entropy,
        found.statistics.teacher_entropy,
        found.statistics.student_entropy,
        found.statistics.forward_kl,
        found.statistics.reverse_kl,
        found.statistics.top1_agreement,
    )


def student_loss(
    student_nV: Tensor, labels: Tensor | None, weights: ChunkWeights, spec: DivergenceSpec, needs_gradient: bool
) -> PerToken:
    """Against nobody: the cross-entropy. The student stands in for its teacher, from which it diverges by 0."""
    alone = replace(spec, divergence=FORWARD_KL)
    weights = replace(weights, divergence=torch.zeros_like(weights.divergence))
    found = full_loss(student_nV, student_nV, labels, weights, alone, needs_gradient)
    nothing = torch.zeros_like(found.divergence)
    return found._replace(teacher_entropy=nothing, top1_agreement=nothing)


def topk_loss(
    student_nV: Tensor,
    topk: TopK,
    labels: Tensor | None,
    weights: ChunkWeights,
    spec: DivergenceSpec,
    topk_spec: TopKSpec,
    needs_gradient: bool,
    scratch_nV: Tensor | None = None,
) -> PerToken:
    """Against the teacher's most likely tokens, and the cross-entropy over the whole vocabulary beside that.

    `scratch_nV` may be overwritten; it is made where it is needed and missing.
    """
    normalizers, sums = measure_topk(student_nV, topk, topk_spec)
    with_labels = needs_gradient and weights.cross_entropy is not None
    gradient = student_nV
    if with_labels:  # which still need the logits
        gradient = torch.empty_like(student_nV) if scratch_nV is None else scratch_nV
        write_topk_gradient(gradient, student_nV, topk, normalizers, sums.slope, weights.divergence, topk_spec)
    cross_entropy = torch.zeros_like(sums.value)
    if labels is not None:
        cross_entropy = student_loss(student_nV, labels, weights, spec, with_labels).cross_entropy
    if with_labels:
        student_nV += gradient
    elif needs_gradient:
        write_topk_gradient(gradient, student_nV, topk, normalizers, sums.slope, weights.divergence, topk_spec)
    return PerToken(
        sums.value,
        cross_entropy,
        sums.teacher_entropy,
        sums.student_entropy,
        sums.forward_kl,
        sums.reverse_kl,
        sums.top1_agreement,
    )


def _write_gradient(
    student_nV: Tensor,
    teacher_nV: Tensor,
    found: Measured,
    labels: Tensor | None,
    weights: ChunkWeights,
    spec: DivergenceSpec,
) -> None:
    of_labels = {}
    if weights.cross_entropy is not None:
        here, column = spec.shard.owned(labels)
        of_labels = {
            "untempered_2N": found.untempered,
            "label_weight_N": weights.cross_entropy,
            "label_N": torch.where(here, column, -1),
        }
    normalizers = found.normalizers.packed()
    passes.gradient(
        student_nV, student_nV, teacher_nV, normalizers, found.slope_sum, weights.divergence, spec, **of_labels
    )

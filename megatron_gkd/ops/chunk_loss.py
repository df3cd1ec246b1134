"""The loss of one chunk of tokens from their logits: metrics of each token, and the gradient by the student's logits.

One function for each kind of teacher: its logits, its top-k, or none. Shape suffixes: n tokens of the chunk, V valid
columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.forward import compute_forward_with_statistics, compute_student_forward
from megatron_gkd.ops.normalizers import CrossEntropy
from megatron_gkd.ops.params import DivergenceRows, LabelRows, Logits
from megatron_gkd.ops.spec import ShardSpec, TopKShardSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_statistics import compute_topk_forward, write_topk_gradient


class PerToken(NamedTuple):
    """Hold the metrics of each token, [N], detached, in fp32 (fp64 for fp64).

    They have the same bits on all ranks of the group. All but the cross-entropy are of the distributions at the
    temperature of the loss (over the top-k, where the divergence is), in nats, and 0 where they need a teacher and
    there is none.

    Attributes:
        divergence: the divergence of the loss.
        cross_entropy: of the student at temperature 1, over the whole vocabulary; 0 where there is no label.
        teacher_entropy: the entropy of the teacher's distribution.
        student_entropy: the entropy of the student's distribution.
        forward_kl: KL(T||S).
        reverse_kl: KL(S||T).
        top1_agreement: 1.0 where both have the same most likely token, else 0.
    """

    divergence: Tensor
    cross_entropy: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agreement: Tensor


@dataclass(frozen=True)
class ChunkTargets:
    """Hold what the loss needs of each token of a chunk beside the logits; weights are in the dtype of the statistics.

    Attributes:
        token_weights: [n], of the divergence in the loss.
        labels: int64 [n], global ids; None without a cross-entropy.
        label_weights: [n], of the cross-entropy in the loss, 0 where the label is ignored; None where the cross-entropy
            is a metric only.
    """

    token_weights: Tensor
    labels: Tensor | None
    label_weights: Tensor | None

    def scaled(self, factor: float) -> ChunkTargets:
        """Return the same with all weights multiplied by `factor`."""
        label_weights = None if self.label_weights is None else self.label_weights * factor
        return replace(self, token_weights=self.token_weights * factor, label_weights=label_weights)

    def label_rows(self, cross_entropy: CrossEntropy | None, spec: ShardSpec) -> LabelRows | None:
        """Return what the gradient needs of the labels; None where they have no gradient."""
        if self.labels is None or self.label_weights is None or cross_entropy is None:
            return None
        here, column = spec.shard.owned(self.labels)
        return LabelRows(cross_entropy.normalizers, self.label_weights, torch.where(here, column, -1))


def compute_full_loss(
    student_nV: Tensor, teacher_nV: Tensor, targets: ChunkTargets, spec: ShardSpec, needs_gradient: bool
) -> PerToken:
    """Compare with the teacher's logits. With `needs_gradient`, the gradient overwrites the student's logits."""
    logits = Logits(student_nV, teacher_nV)
    found = compute_forward_with_statistics(logits, spec, targets.labels)
    if needs_gradient:
        rows = DivergenceRows(found.normalizers.packed(), found.slope_sum, targets.token_weights)
        passes.gradient(student_nV, logits, rows, targets.label_rows(found.cross_entropy, spec), spec)
    return PerToken(
        found.divergence,
        torch.zeros_like(found.divergence) if found.cross_entropy is None else found.cross_entropy.value,
        found.statistics.teacher_entropy,
        found.statistics.student_entropy,
        found.statistics.forward_kl,
        found.statistics.reverse_kl,
        found.statistics.top1_agreement,
    )


def compute_student_loss(student_nV: Tensor, targets: ChunkTargets, spec: ShardSpec, needs_gradient: bool) -> PerToken:
    """Compute the cross-entropy without a teacher. With `needs_gradient`, its gradient overwrites the logits."""
    found = compute_student_forward(student_nV, spec, targets.labels)
    if needs_gradient:
        labels = targets.label_rows(found.cross_entropy, spec)
        if labels is None:
            student_nV.zero_()
        else:
            passes.cross_entropy_gradient(student_nV, student_nV, labels, spec.softcap)
    zero = torch.zeros_like(found.entropy)
    cross_entropy = zero if found.cross_entropy is None else found.cross_entropy.value
    return PerToken(zero, cross_entropy, zero, found.entropy, zero, zero, zero)


def compute_topk_loss(
    student_nV: Tensor,
    topk: TopK,
    targets: ChunkTargets,
    spec: TopKShardSpec,
    needs_gradient: bool,
    buffer_nV: Tensor | None = None,
) -> PerToken:
    """Compare with the teacher's top-k, and compute the cross-entropy over the whole vocabulary.

    With `needs_gradient`, the gradient overwrites the student's logits. `buffer_nV` may be overwritten; without it, a
    buffer is allocated where one is needed.
    """
    found = compute_topk_forward(student_nV, topk, spec)
    rows = found.gradient_rows(targets.token_weights)
    needs_label_gradient = needs_gradient and targets.label_weights is not None
    gradient = student_nV
    if needs_label_gradient:  # the cross-entropy still needs the logits
        gradient = torch.empty_like(student_nV) if buffer_nV is None else buffer_nV
        write_topk_gradient(gradient, student_nV, topk, rows, spec)
    cross_entropy = torch.zeros_like(found.divergence)
    if targets.labels is not None:
        cross_entropy = compute_student_loss(student_nV, targets, spec.base, needs_label_gradient).cross_entropy
    if needs_label_gradient:
        student_nV += gradient
    elif needs_gradient:
        write_topk_gradient(gradient, student_nV, topk, rows, spec)
    return PerToken(
        found.divergence,
        cross_entropy,
        found.teacher_entropy,
        found.student_entropy,
        found.forward_kl,
        found.reverse_kl,
        found.top1_agreement,
    )

"""The forward computation of each token: all but the gradient, in one or two passes with their collectives."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.combine import combine_statistics, combine_sums, student_token_statistics, token_statistics
from megatron_gkd.ops.params import ChunkTargets, DivergenceRows, LabelRows, Logits, TokenResults
from megatron_gkd.ops.spec import ShardSpec

_NO_TARGETS = ChunkTargets()


class Forward(NamedTuple):
    """Hold what the gradient needs of N tokens, with the same bits on every rank of the group.

    Attributes:
        normalizers: [N, 4], of both models; see ``normalizers.Normalizers.packed``.
        slope_sum: [N].
        weight: [N], the gradient of the loss by each token's divergence; None without weights.
        labels: None without labels.
    """

    normalizers: Tensor
    slope_sum: Tensor
    weight: Tensor | None
    labels: LabelRows | None

    def divergence_rows(self) -> DivergenceRows:
        """Return what the gradient pass needs; there must be weights."""
        assert self.weight is not None, "a gradient needs weights"
        return DivergenceRows(self.normalizers, self.slope_sum, self.weight)


def compute_forward(
    logits: Logits, spec: ShardSpec, results: TokenResults, targets: ChunkTargets = _NO_TARGETS, *, moments: bool = True
) -> Forward:
    """Compute the divergence and, with labels, the cross-entropy; one collective for the KL divergences, else two.

    Args:
        logits: of both models.
        spec: the divergence and the shard.
        results: are overwritten. Metrics other than the cross-entropy are 0 outside the mask.
        targets: labels and weights.
        moments: also compute the metrics that are neither the divergence nor the cross-entropy. They are the sums of
            the KL divergences, for which they are computed in any case.
    """
    moments = moments or not spec.needs_sums
    gathered = spec.shard.gather(token_statistics(logits, targets.labels, spec, moments=moments))
    found = combine_statistics(gathered, spec, targets, results, has_teacher=True, moments=moments, mask=logits.mask)
    normalizers, slope_sum = found.normalizers, found.slope_sum
    assert normalizers is not None, "there is a teacher"
    if slope_sum is None:
        gathered = spec.shard.gather(passes.sums(logits, normalizers, spec))
        slope_sum = combine_sums(gathered, targets, results)
    return Forward(normalizers, slope_sum, found.weight, found.labels)


def compute_student_forward(
    student_NV: Tensor, spec: ShardSpec, results: TokenResults, targets: ChunkTargets = _NO_TARGETS
) -> LabelRows | None:
    """Compute what needs no teacher, and return what the gradient needs of the labels. One collective.

    Args:
        student_NV: the student's logits.
        spec: the temperature and the shard.
        results: are overwritten.
        targets: labels and weights.
    """
    gathered = spec.shard.gather(student_token_statistics(student_NV, targets.labels, spec))
    return combine_statistics(gathered, spec, targets, results, has_teacher=False).labels

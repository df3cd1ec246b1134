"""What the collectives of the passes carry, and what follows from it for each token.

Two collectives carry numbers of each token between the ranks of a vocabulary: statistics and sums. After each of them
one function writes the token's metrics and what it adds to the loss, and returns what the gradient needs: one compiled
kernel (``csrc/combine.h``), or ``torch_combine``, the same in plain torch. ``passes`` says which of the two.

Shape suffixes: R ranks, N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_gkd.ops import torch_combine
from megatron_gkd.ops.params import ChunkTargets, LabelRows, Logits, TokenResults
from megatron_gkd.ops.passes import kernels_for
from megatron_gkd.ops.spec import ShardSpec


class CombinedRows(NamedTuple):
    """Hold what the gradient needs of each token, with the same bits on all ranks; None where it does not apply.

    Attributes:
        normalizers: [N, 4], see ``DivergenceRows``; None without a teacher.
        slope_sum: [N]; None where it comes from the sums.
        weight: [N], the gradient of the loss by each token's divergence; None without a loss.
        labels: of the cross-entropy, whose weight is 0 where it is a metric only; None without labels.
    """

    normalizers: Tensor | None
    slope_sum: Tensor | None
    weight: Tensor | None
    labels: LabelRows | None


def token_statistics(logits: Logits, labels: Tensor | None, spec: ShardSpec, *, moments: bool) -> Tensor:
    """Return this rank's statistics of each token and, with `labels`, the logits of those that it has, as one vector.

    Args:
        logits: of both models.
        labels: int64 [N], global ids; with them come the statistics at temperature 1.
        spec: the temperature and the shard.
        moments: see ``passes.statistics``.
    """
    kernels = kernels_for(logits.student)
    if kernels is None:
        return torch_combine.token_statistics(logits, labels, spec, moments=moments)
    return kernels.token_statistics(*logits, labels, spec.temperature, spec.shard.first, moments)


def student_token_statistics(student_NV: Tensor, labels: Tensor | None, spec: ShardSpec) -> Tensor:
    """Return the student's part of ``token_statistics``, with moments and with statistics at temperature 1."""
    kernels = kernels_for(student_NV)
    if kernels is None:
        return torch_combine.student_token_statistics(student_NV, labels, spec)
    return kernels.token_statistics(student_NV, None, None, labels, spec.temperature, spec.shard.first, True)


def combine_statistics(
    gathered_R: Tensor,
    spec: ShardSpec,
    targets: ChunkTargets,
    results: TokenResults,
    *,
    has_teacher: bool,
    moments: bool = True,
    mask: Tensor | None = None,
) -> CombinedRows:
    """Write all results but the divergence where ``spec.needs_sums``, which is then not in the losses either.

    Args:
        gathered_R: ``token_statistics`` or, without a teacher, ``student_token_statistics`` of all ranks, [R, ...].
        spec: the specification that they were computed with.
        targets: the labels that they were computed with, and the weights.
        results: of N tokens, which are overwritten.
        has_teacher: which of the two they are.
        moments: as they were computed.
        mask: bool [N]; all metrics but the cross-entropy are 0 where it is False.
    """
    kernels = kernels_for(gathered_R)
    if kernels is None:
        found = torch_combine.combine_statistics(
            gathered_R, spec, targets, results, has_teacher=has_teacher, moments=moments, mask=mask
        )
    else:
        weights = targets.token_weights, targets.label_weights
        divergence = spec.divergence.name, spec.temperature
        shard = spec.shard.first, spec.shard.valid
        which = len(results.metrics), has_teacher, moments
        found = kernels.combine_statistics(
            gathered_R, *which, mask, targets.labels, *weights, *results, *divergence, targets.factor, *shard
        )
    normalizers, slope_sum, weight, untempered, label_weight, column = found
    labels = None
    if untempered is not None and label_weight is not None and column is not None:
        labels = LabelRows(untempered, label_weight, column)
    return CombinedRows(normalizers, slope_sum, weight, labels)


def combine_sums(gathered_RN2: Tensor, targets: ChunkTargets, results: TokenResults) -> Tensor:
    """Write the divergence of each token, add it to the losses, and return the slope sum [N].

    Args:
        gathered_RN2: ``passes.sums`` of all ranks.
        targets: the weights.
        results: as ``combine_statistics`` has left them.
    """
    kernels = kernels_for(gathered_RN2)
    if kernels is None:
        return torch_combine.combine_sums(gathered_RN2, targets, results)
    return kernels.combine_sums(gathered_RN2, targets.token_weights, *results)

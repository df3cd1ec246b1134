"""The forward computation of each token: all but the gradient, in one or two passes with their collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.normalizers import (
    Combined,
    CrossEntropy,
    Normalizers,
    TokenStatistics,
    combine_cross_entropy,
    combine_student_entropy,
)
from megatron_gkd.ops.params import Logits
from megatron_gkd.ops.reference import REVERSE_KL
from megatron_gkd.ops.spec import ShardSpec


@dataclass(frozen=True)
class Forward:
    """Hold the divergence of N tokens over the whole vocabulary, with the same bits on every rank of the group.

    Attributes:
        normalizers: of both models.
        divergence: [N], in nats; 0 outside the mask.
        slope_sum: [N], which the gradient needs beside the normalizers.
    """

    normalizers: Normalizers
    divergence: Tensor
    slope_sum: Tensor


@dataclass(frozen=True)
class ForwardWithStatistics(Forward):
    """Hold also the statistics of each token.

    Attributes:
        statistics: 0 outside the mask.
        cross_entropy: of the student; None without labels.
    """

    statistics: TokenStatistics
    cross_entropy: CrossEntropy | None


@dataclass(frozen=True)
class StudentForward:
    """Hold what needs no teacher, of N tokens.

    Attributes:
        entropy: [N], of the student at the temperature of the loss, in nats.
        cross_entropy: of the student; None without labels.
    """

    entropy: Tensor
    cross_entropy: CrossEntropy | None


def compute_forward(logits: Logits, spec: ShardSpec) -> Forward:
    """Compute the divergence. One collective for the KL divergences, whose sums are moments, two for the others."""
    if not spec.needs_sums:
        return compute_forward_with_statistics(logits, spec)
    local = passes.statistics(logits, spec, moments=False)
    normalizers = Combined(spec.shard.gather(local), spec).normalizers()
    return Forward(normalizers, *_sum_terms(logits, normalizers, spec))


def compute_forward_with_statistics(
    logits: Logits, spec: ShardSpec, labels: Tensor | None = None
) -> ForwardWithStatistics:
    """Compute the divergence, the statistics and, with `labels` (int64 [N], global ids), the cross-entropy.

    The number of collectives is that of ``compute_forward``.
    """
    local = passes.statistics(logits, spec, moments=True, untempered=labels is not None)
    gathered = spec.shard.gather(_with_label_logit(local, logits.student, labels, spec))
    combined = Combined(gathered, spec)
    normalizers, statistics = combined.normalizers(), combined.token_statistics()
    if logits.mask is not None:
        statistics = TokenStatistics(*(torch.where(logits.mask, x, 0) for x in statistics))
    if spec.needs_sums:
        divergence, slope_sum = _sum_terms(logits, normalizers, spec)
    elif spec.divergence is REVERSE_KL:
        divergence = slope_sum = statistics.reverse_kl
    else:  # the slopes p - q of the forward KL divergence add up to 0
        divergence, slope_sum = statistics.forward_kl, torch.zeros_like(statistics.forward_kl)
    cross_entropy = None
    if labels is not None:
        cross_entropy = combine_cross_entropy(gathered[..., 0], gathered[..., -2], gathered[..., -1], labels)
    return ForwardWithStatistics(normalizers, divergence, slope_sum, statistics, cross_entropy)


def compute_student_forward(student_NV: Tensor, spec: ShardSpec, labels: Tensor | None) -> StudentForward:
    """Compute what needs no teacher, with `labels` (int64 [N], global ids) or without. One collective."""
    local = passes.student_statistics(student_NV, spec)
    gathered = spec.shard.gather(_with_label_logit(local, student_NV, labels, spec))
    cross_entropy = None
    if labels is not None:
        cross_entropy = combine_cross_entropy(gathered[..., 0], gathered[..., 3], gathered[..., 4], labels)
    return StudentForward(combine_student_entropy(gathered, spec), cross_entropy)


def _sum_terms(logits: Logits, normalizers: Normalizers, spec: ShardSpec) -> tuple[Tensor, Tensor]:
    """Return the divergence and the slope sum, each [N]. One collective."""
    sums = passes.sums(logits, normalizers.packed(), spec)
    divergence, slope_sum = spec.shard.gather(sums).sum(0, dtype=torch.float64).to(sums.dtype).unbind(-1)
    return divergence.contiguous(), slope_sum.contiguous()


def _with_label_logit(statistics: Tensor, student_NV: Tensor, labels: Tensor | None, spec: ShardSpec) -> Tensor:
    """Append the label's logit as a last column; -inf where another rank has the label, or none."""
    if labels is None:
        return statistics
    here, column = spec.shard.owned(labels)
    if student_NV.shape[1] == 0:
        logit = student_NV.new_full((len(labels), 1), -torch.inf)
    else:
        logit = torch.where(here[:, None], student_NV.gather(1, column[:, None]), -torch.inf)
    return torch.cat([statistics, logit.to(statistics.dtype)], -1)

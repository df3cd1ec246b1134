"""Everything about some tokens but the gradient: the first two passes, with their collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.normalizers import Normalizers, TokenStatistics, combine
from megatron_gkd.ops.reference import REVERSE_KL
from megatron_gkd.ops.spec import DivergenceSpec


@dataclass(frozen=True)
class Measured:
    """Of N tokens, over the whole vocabulary, the same bits on every rank of the group."""

    normalizers: Normalizers
    divergence: Tensor  # [N], nats
    slope_sum: Tensor  # [N], what the gradient needs beside the normalizers
    statistics: TokenStatistics | None
    untempered: Tensor | None  # [2, N], where there are labels
    cross_entropy: Tensor | None  # [N], where there are labels


def measure(
    student_NV: Tensor,
    teacher_NV: Tensor,
    spec: DivergenceSpec,
    *,
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    moments: bool = False,
) -> Measured:
    """One collective for the KL divergences, whose sums are among the moments, and two for the others.

    Logits are this rank's valid columns. Rows outside `mask` are not read; they get 0. `moments` asks for the
    statistics.
    """
    moments = moments or not spec.needs_sums
    local = passes.statistics(student_NV, teacher_NV, mask, spec, moments=moments, untempered=labels is not None)
    if labels is not None:
        local = torch.cat([local, _label_logit(student_NV, labels, spec).to(local.dtype)], -1)
    combined = combine(spec.shard.gather(local), spec, moments=moments, labels=labels)
    statistics = combined.statistics
    if statistics is not None and mask is not None:
        statistics = TokenStatistics(*(torch.where(mask, x, 0) for x in statistics))
    if spec.needs_sums:
        sums = passes.sums(student_NV, teacher_NV, mask, combined.normalizers.packed(), spec)
        divergence, slope_sum = spec.shard.gather(sums).sum(0, dtype=torch.float64).to(sums.dtype).unbind(-1)
    elif spec.divergence is REVERSE_KL:
        divergence = slope_sum = statistics.reverse_kl
    else:  # the slopes p - q of the forward KL divergence add up to 0
        divergence, slope_sum = statistics.forward_kl, torch.zeros_like(statistics.forward_kl)
    return Measured(
        combined.normalizers,
        divergence.contiguous(),
        slope_sum.contiguous(),
        statistics,
        combined.untempered,
        combined.cross_entropy,
    )


def _label_logit(student_NV: Tensor, labels: Tensor, spec: DivergenceSpec) -> Tensor:
    """[N, 1]; -inf where another rank has the label, or none."""
    here, column = spec.shard.owned(labels)
    if student_NV.shape[1] == 0:
        return student_NV.new_full((len(labels), 1), -torch.inf)
    return torch.where(here[:, None], student_NV.gather(1, column[:, None]), -torch.inf)

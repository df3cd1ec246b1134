"""``combine`` in plain torch: for fp64, where no kernels are compiled, and to read.

Shape suffixes: R ranks, N tokens, C columns of ``csrc/params.h``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.ops import torch_passes
from megatron_gkd.ops.normalizers import Combined, combine_cross_entropy, combine_student_entropy
from megatron_gkd.ops.params import ChunkTargets, Logits, TokenResults
from megatron_gkd.ops.pointwise import weighted
from megatron_gkd.ops.reference import REVERSE_KL
from megatron_gkd.ops.spec import ShardSpec


def token_statistics(logits: Logits, labels: Tensor | None, spec: ShardSpec, *, moments: bool) -> Tensor:
    """Compute ``combine.token_statistics`` in plain torch."""
    local = torch_passes.statistics(logits, spec, moments=moments, untempered=labels is not None)
    return _with_label_logits(local, logits.student, labels, spec)


def student_token_statistics(student_NV: Tensor, labels: Tensor | None, spec: ShardSpec) -> Tensor:
    """Compute ``combine.student_token_statistics`` in plain torch."""
    return _with_label_logits(torch_passes.student_statistics(student_NV, spec), student_NV, labels, spec)


def _with_label_logits(statistics: Tensor, student_NV: Tensor, labels: Tensor | None, spec: ShardSpec) -> Tensor:
    """Append the labels' logits; -inf where another rank has the label, or none."""
    if labels is None:
        return statistics.flatten()
    here, column = spec.shard.owned(labels)
    if student_NV.shape[1] == 0:
        logits = torch.full_like(statistics[:, 0], -torch.inf)
    else:
        logits = torch.where(here, student_NV.gather(1, column[:, None])[:, 0].to(statistics.dtype), -torch.inf)
    return torch.cat([statistics.flatten(), logits])


def combine_statistics(
    gathered_R: Tensor,
    spec: ShardSpec,
    targets: ChunkTargets,
    results: TokenResults,
    *,
    has_teacher: bool,
    moments: bool,
    mask: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Compute ``combine.combine_statistics`` in plain torch: the fields of ``CombinedRows`` one after another."""
    columns = (10 if moments else 4) + (targets.labels is not None) if has_teacher else 4
    tokens = len(results.metrics)
    gathered_RNC = gathered_R[:, : tokens * columns].view(len(gathered_R), tokens, columns)
    results.metrics.zero_()
    token = results.per_token
    normalizers = slope_sum = None
    if has_teacher:
        combined = Combined(gathered_RNC, spec)
        normalizers = combined.normalizers().packed()
        if moments:
            for name, values in combined.token_statistics()._asdict().items():
                getattr(token, name).copy_(values if mask is None else torch.where(mask, values, 0))
        if not spec.needs_sums:
            is_reverse = spec.divergence is REVERSE_KL
            token.divergence.copy_(token.reverse_kl if is_reverse else token.forward_kl)
            # The slopes p - q of the forward KL divergence add up to 0.
            slope_sum = token.divergence.clone() if is_reverse else torch.zeros_like(token.divergence)
    else:
        token.student_entropy.copy_(combine_student_entropy(gathered_RNC, spec))
    of_labels: tuple[Tensor | None, ...] = (None, None, None)
    label_weights = None
    if targets.labels is not None:
        untempered_RN, logits_RN = gathered_RNC[..., -1], gathered_R[:, tokens * columns :]
        found = combine_cross_entropy(gathered_RNC[..., 0], untempered_RN, logits_RN, targets.labels)
        token.cross_entropy.copy_(found.value)
        label_weights = torch.zeros_like(found.value) if targets.label_weights is None else targets.label_weights
        label_weights = torch.where(targets.labels == IGNORED_LABEL, 0, label_weights)
        here, column = spec.shard.owned(targets.labels)
        of_labels = found.normalizers, label_weights * targets.factor, torch.where(here, column, -1)
    weight = None
    if targets.token_weights is not None:
        weight = targets.token_weights * targets.factor
    if results.losses is not None and targets.token_weights is not None:
        results.losses.copy_(weighted(targets.token_weights, token.divergence))
        if label_weights is not None:
            results.losses.add_(weighted(label_weights, token.cross_entropy))
    return normalizers, slope_sum, weight, *of_labels


def combine_sums(gathered_RN2: Tensor, targets: ChunkTargets, results: TokenResults) -> Tensor:
    """Compute ``combine.combine_sums`` in plain torch."""
    divergence, slope_sum = gathered_RN2.sum(0, dtype=torch.float64).to(gathered_RN2.dtype).unbind(-1)
    divergence = divergence.clamp(min=0)  # by rounding
    results.per_token.divergence.copy_(divergence)
    if results.losses is not None and targets.token_weights is not None:
        results.losses.add_(weighted(targets.token_weights, divergence))
    return slope_sum.contiguous()

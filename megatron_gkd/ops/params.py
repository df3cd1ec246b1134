"""The arguments of the passes, which ``csrc/params.h`` and ``csrc/combine.h`` mirror, and what they give each token.

Shape suffixes: N tokens, V valid columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.ops.spec import accumulate_dtype


class Logits(NamedTuple):
    """Hold the logits of both models, over this rank's valid columns.

    Attributes:
        student: [N, V].
        teacher: [N, V], of the same dtype.
        mask: bool [N], False for rows that are not read; None if all rows are.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor | None = None


class DivergenceRows(NamedTuple):
    """Hold what the gradient of the divergence needs of each token, in the dtype of the statistics.

    Attributes:
        normalizers: [N, 4], from ``Normalizers.packed``.
        slope_sum: [N], over the whole vocabulary, in the unit of the implementation that computed it.
        weight: [N], the gradient of the loss by each token's divergence.
    """

    normalizers: Tensor
    slope_sum: Tensor
    weight: Tensor


class LabelRows(NamedTuple):
    """Hold what the gradient of the cross-entropy needs of each token, in the dtype of the statistics.

    Attributes:
        normalizers: [2, N], shift and bias of the student at temperature 1.
        weight: [N], the gradient of the loss by each token's cross-entropy.
        column: int64 [N], this shard's column of the label; -1 where another rank has it.
    """

    normalizers: Tensor
    weight: Tensor
    column: Tensor


class LossWeights(NamedTuple):
    """Hold the gradients of the loss by each token's losses, in the dtype of the statistics.

    Attributes:
        divergence: [N].
        cross_entropy: [N], 0 where there is no label; None without one in the loss.
    """

    divergence: Tensor
    cross_entropy: Tensor | None


class LossSums(NamedTuple):
    """Hold what a pass over whole rows has found beside the gradient.

    Attributes:
        statistics: of ``combine.token_statistics``, with moments.
        sums: of ``passes.sums``; without meaning for the KL divergences, which have none.
    """

    statistics: Tensor
    sums: Tensor


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
        top1_agreement: 1.0 where both have the same most likely token (the lowest id among equals), else 0.
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
        token_weights: [n], of the divergence in the loss; None without a loss.
        labels: int64 [n], global ids, -100 for none; None without a cross-entropy.
        label_weights: [n], of the cross-entropy in the loss, without effect where there is no label; None where the
            cross-entropy is a metric only.
        factor: of all gradients.
    """

    token_weights: Tensor | None = None
    labels: Tensor | None = None
    label_weights: Tensor | None = None
    factor: float = 1.0

    def __getitem__(self, chunk: slice) -> ChunkTargets:
        def rows(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[chunk]

        return ChunkTargets(rows(self.token_weights), rows(self.labels), rows(self.label_weights), self.factor)

    def scaled(self) -> ChunkTargets:
        """Return the same with the factor of the gradients in the weights, which are 0 where there is no label."""
        token_weights, label_weights = self.token_weights, self.label_weights
        if label_weights is not None and self.labels is not None:
            label_weights = torch.where(self.labels == IGNORED_LABEL, 0, label_weights)
        if self.factor != 1:
            token_weights, label_weights = (
                None if one is None else one * self.factor for one in (token_weights, label_weights)
            )
        return replace(self, token_weights=token_weights, label_weights=label_weights, factor=1.0)


class TokenResults(NamedTuple):
    """Hold what is written of each token, in the dtype of the statistics.

    Attributes:
        metrics: [N, 7], in the order of ``PerToken``.
        losses: [N], what each token adds to the loss; None without a loss.
    """

    metrics: Tensor
    losses: Tensor | None

    @classmethod
    def empty(cls, rows: Tensor, *, has_losses: bool) -> TokenResults:
        """Allocate the results of tokens with logits or hidden states `rows`, [N, ...]."""
        shape, dtype = (len(rows), len(PerToken._fields)), accumulate_dtype(rows.dtype)
        metrics = torch.empty(shape, dtype=dtype, device=rows.device)
        return cls(metrics, metrics.new_empty(len(rows)) if has_losses else None)

    def rows(self, chunk: slice) -> TokenResults:
        """Return those of a chunk of tokens, as views."""
        return TokenResults(self.metrics[chunk], None if self.losses is None else self.losses[chunk])

    @property
    def per_token(self) -> PerToken:
        """The metrics by name, as views."""
        return PerToken(*self.metrics.unbind(-1))

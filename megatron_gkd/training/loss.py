"""The loss of a microbatch, from its hidden states.

The loss of a step is a sum over all labels of the global batch, each with its weight, divided by the number of labels,
whatever their weights. Each microbatch contributes its plain sum; Megatron divides the reduced gradient by the reduced
token count (`calculate_per_token_loss`). So neither loss nor gradient depends on the division into microbatches. One
thing does: the load-balancing loss of a mixture of experts, a product of two means over the tokens of a microbatch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.label_rows import label_rows
from megatron_gkd.ops.fused_linear import FusedLinearOptions, LinearHead, TokenTargets, fused_linear_divergence
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.params import PerToken
from megatron_gkd.ops.spec import DivergenceSpec, TailMode, TopKSpec
from megatron_gkd.ops.topk import MISSING, TopK
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden, Parts, TeacherSignal

SUMS = (
    "loss",
    "divergence",
    "cross_entropy",
    "student_cross_entropy",
    "teacher_entropy",
    "student_entropy",
    "forward_kl",
    "reverse_kl",
    "top1_agreement",
    "tokens",
    "dataset_tokens",
    "dropped_tokens",
)
"""The sums over tokens that `Objective` computes, in order. Weights of labels are factors in `loss` alone.
`cross_entropy` is over rows of the dataset alone, and `student_cross_entropy` over rows that the student generated.
Dropped tokens, for which the teacher has no distribution, are in no other sum."""


class LabelLosses(NamedTuple):
    """The loss of N labels, and the statistics of each.

    Attributes:
        total: scalar, with a gradient.
        token: [N] each.
        valid_mask: fp32 [N]: 1, or 0 where the teacher has no distribution.
    """

    total: Tensor
    token: PerToken
    valid_mask: Tensor


class MicrobatchMetrics(NamedTuple):
    """The metrics of one microbatch.

    Attributes:
        sums: fp64, `SUMS` in order.
        divergence: [N], of every label in order; NaN where the teacher has no distribution.
    """

    sums: Tensor
    divergence: Tensor


@dataclass(frozen=True)
class Objective:
    """Σ over tokens of weight · (divergence + sft_alpha · cross-entropy); cross-entropy alone without a teacher.

    Attributes:
        mesh: the process groups.
        vocab_size: number of ids that teacher and student share.
        divergence: name of the divergence; `beta` and `temperature` are its parameters.
        beta: see ``divergence``.
        temperature: of both distributions.
        sft_alpha: weight of the cross-entropy on rows of the dataset.
        k: compare the teacher's k most likely tokens; None: all.
        tail_mode: the treatment of the other tokens where `k` is given.
        chunk_tokens: number of rows of logits that exist at the same time; see ``FusedLinearOptions``.
        upstream: the gradient that the loss will get in backward, where it is known; see ``FusedLinearOptions``.
    """

    mesh: Mesh
    vocab_size: int
    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    sft_alpha: float = 0.0
    k: int | None = None
    tail_mode: TailMode = "renormalize"
    chunk_tokens: int | None = None
    upstream: float | None = None

    def __call__(
        self, hidden: Tensor, head: OutputHead, microbatch: Microbatch, signal: TeacherSignal | None
    ) -> tuple[Tensor, Tensor, MicrobatchMetrics]:
        """Compute the loss of one microbatch on the last pipeline stage.

        Args:
            hidden: [1, T(/TP), H_S], the student's last hidden states.
            head: of the student, V/TP rows.
            microbatch: with N labels on this rank.
            signal: the teacher's, for the same N labels; None without a teacher.

        Returns:
            The sum of losses, the number of tokens, and the metrics.
        """
        positions = microbatch.label_positions
        student = label_rows(hidden, positions, self.mesh)
        labels = microbatch.labels.squeeze(0)[positions]
        from_dataset = microbatch.from_dataset.squeeze(0)[positions].float()
        label_weights = microbatch.label_weights
        weights = None if label_weights is None else label_weights.squeeze(0)[positions]
        total, token, valid_mask = self.compute(student, head, labels, from_dataset, signal, weights)
        by_dataset = from_dataset * valid_mask
        masked = (
            (token.divergence, valid_mask),
            (token.cross_entropy, by_dataset),
            (token.cross_entropy, valid_mask - by_dataset),
            (token.teacher_entropy, valid_mask),
            (token.student_entropy, valid_mask),
            (token.forward_kl, valid_mask),
            (token.reverse_kl, valid_mask),
            (token.top1_agreement, valid_mask),
        )
        sums = [total.detach(), *((values * mask).sum(dtype=torch.float64) for values, mask in masked)]
        sums += [x.sum(dtype=torch.float64) for x in (valid_mask, by_dataset, 1 - valid_mask)]
        divergence = token.divergence.masked_fill(valid_mask == 0, torch.nan)
        return total, valid_mask.sum().int(), MicrobatchMetrics(torch.stack([x.double() for x in sums]), divergence)

    def compute(
        self,
        student: Tensor,
        head: OutputHead,
        labels: Tensor,
        from_dataset: Tensor,
        signal: TeacherSignal | None,
        weights: Tensor | None = None,
    ) -> LabelLosses:
        """Compute the loss of N labels.

        Args:
            student: [N, H_S], the student's last hidden states.
            head: of the student, V/TP rows.
            labels: int64 [N].
            from_dataset: fp32 [N]: 1 for a label of the dataset, 0 for a token that the student sampled.
            signal: the teacher's, for the same N labels; None without a teacher.
            weights: fp32 [N], the factor of each label's loss; None: 1.
        """
        weights = torch.ones_like(from_dataset) if weights is None else weights
        if not isinstance(signal, Parts):
            return self._compute(student, head, labels, from_dataset, weights, signal)
        losses = [
            self._compute(
                student[part.rows], head, labels[part.rows], from_dataset[part.rows], weights[part.rows], part.signal
            )
            for part in signal.parts
        ]
        order = torch.cat([part.rows for part in signal.parts]).argsort()
        token = PerToken(*(torch.cat(values)[order] for values in zip(*(one.token for one in losses), strict=True)))
        total = functools.reduce(torch.add, (one.total for one in losses))
        return LabelLosses(total, token, torch.cat([one.valid_mask for one in losses])[order])

    def _compute(
        self,
        student: Tensor,
        head: OutputHead,
        labels: Tensor,
        from_dataset: Tensor,
        weights: Tensor,
        signal: Hidden | TopK | None,
    ) -> LabelLosses:
        valid_mask = torch.ones_like(from_dataset)
        if isinstance(signal, TopK):
            is_entry = (signal.ids >= 0) & (signal.ids < self.vocab_size) & (signal.values > -torch.inf)
            valid_mask = is_entry.any(-1).float()
            # Without an entry all mass of both models is in the tail. Improbable entries alone would give no number.
            is_empty = valid_mask == 0
            tail = None if signal.tail is None else signal.tail.masked_fill(is_empty, 0)
            signal = replace(signal, ids=signal.ids.masked_fill(is_empty[:, None], MISSING), tail=tail)
        sft_alpha = 1.0 if signal is None else self.sft_alpha
        weights = weights * valid_mask
        sft_weights = sft_alpha * from_dataset * weights if sft_alpha else None
        total, token = fused_linear_divergence(
            LinearHead(student, head),
            LinearHead(signal.states.gather(), signal.head) if isinstance(signal, Hidden) else signal,
            TokenTargets(weights, labels, sft_weights),
            DivergenceSpec(self.beta, self.temperature, self.divergence, self.mesh.tp, self.vocab_size),
            TopKSpec(self.k, self.tail_mode),
            FusedLinearOptions(self.chunk_tokens, self.upstream),
        )
        return LabelLosses(total, token, valid_mask)

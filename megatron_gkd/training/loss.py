"""From a microbatch's hidden states to its share of the step's loss.

The loss of a step is a sum over all response tokens of the global batch divided by their number. Each microbatch
contributes its plain sum; Megatron divides the reduced gradient by the reduced token count
(`calculate_per_token_loss`). So neither loss nor gradient depends on how the batch is cut. One thing does: the
load-balancing loss of a mixture of experts, a product of two means over the tokens of a microbatch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.label_rows import label_rows
from megatron_gkd.ops.chunk_loss import PerToken
from megatron_gkd.ops.fused_linear import (
    DEFAULT_CHUNK_TOKENS,
    FusedLinearOptions,
    LinearHead,
    TokenTargets,
    fused_linear_divergence,
)
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
"""What `Objective` adds up over tokens, in order; `cross_entropy` only over rows that the student did not generate, and
`student_cross_entropy` only over those that it did. Dropped tokens, of which the teacher says nothing, count nowhere
else."""


class Judged(NamedTuple):
    """The loss of N labels and what was measured at each."""

    total: Tensor  # scalar, with a gradient
    token: PerToken
    counted: Tensor  # fp32 [N]: 1, or 0 where the teacher says nothing


class Measured(NamedTuple):
    """What is kept of one microbatch."""

    sums: Tensor  # fp64, `SUMS` in order
    divergence: Tensor  # [N], of every label in order; NaN where the teacher says nothing


@dataclass(frozen=True)
class Objective:
    """Σ over tokens of divergence + sft_alpha · cross-entropy; plain cross-entropy where there is no teacher."""

    mesh: Mesh
    vocab_size: int
    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    sft_alpha: float = 0.0
    k: int | None = None
    tail_mode: TailMode = "renormalize"
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    upstream: float | None = None
    """The gradient that the loss will get in backward, where it is known: see ``FusedLinearOptions``."""

    def __call__(
        self, hidden: Tensor, head_weight: Tensor, microbatch: Microbatch, signal: TeacherSignal | None
    ) -> tuple[Tensor, Tensor, Measured]:
        """Hidden [1, T(/TP), H_S] -> (sum of losses, number of tokens, what was measured)."""
        chosen = microbatch.label_positions
        student = label_rows(hidden, chosen, self.mesh)
        labels = microbatch.labels.squeeze(0)[chosen]
        from_dataset = microbatch.from_dataset.squeeze(0)[chosen].float()
        total, token, counted = self.judge(student, head_weight, labels, from_dataset, signal)
        by_dataset = from_dataset * counted
        measured = (
            (token.divergence, counted),
            (token.cross_entropy, by_dataset),
            (token.cross_entropy, counted - by_dataset),
            (token.teacher_entropy, counted),
            (token.student_entropy, counted),
            (token.forward_kl, counted),
            (token.reverse_kl, counted),
            (token.top1_agreement, counted),
        )
        sums = [total.detach(), *((values * weights).sum(dtype=torch.float64) for values, weights in measured)]
        sums += [x.sum(dtype=torch.float64) for x in (counted, by_dataset, 1 - counted)]
        divergence = token.divergence.masked_fill(counted == 0, torch.nan)
        return total, counted.sum().int(), Measured(torch.stack([x.double() for x in sums]), divergence)

    def judge(
        self, student: Tensor, head_weight: Tensor, labels: Tensor, from_dataset: Tensor, signal: TeacherSignal | None
    ) -> Judged:
        """Student [N, H_S]; labels int64 and from_dataset fp32 [N]; `signal` is of the same N labels."""
        if not isinstance(signal, Parts):
            return self._judge(student, head_weight, labels, from_dataset, signal)
        found = [
            self._judge(student[part.rows], head_weight, labels[part.rows], from_dataset[part.rows], part.signal)
            for part in signal.parts
        ]
        order = torch.cat([part.rows for part in signal.parts]).argsort()
        token = PerToken(*(torch.cat(values)[order] for values in zip(*(one.token for one in found), strict=True)))
        return Judged(sum(one.total for one in found), token, torch.cat([one.counted for one in found])[order])

    def _judge(
        self,
        student: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        from_dataset: Tensor,
        signal: Hidden | TopK | None,
    ) -> Judged:
        counted = torch.ones_like(from_dataset)
        if isinstance(signal, TopK):
            says = (signal.ids >= 0) & (signal.ids < self.vocab_size) & (signal.values > -torch.inf)
            counted = says.any(-1).float()
            # Without an entry all mass of both models is in the tail. Improbable entries alone would give no number.
            silent = counted == 0
            tail = None if signal.tail is None else signal.tail.masked_fill(silent, 0)
            signal = replace(signal, ids=signal.ids.masked_fill(silent[:, None], MISSING), tail=tail)
        sft_alpha = 1.0 if signal is None else self.sft_alpha
        sft_weights = sft_alpha * from_dataset * counted if sft_alpha else None
        total, token = fused_linear_divergence(
            LinearHead(student, head_weight),
            LinearHead(signal.states.gather(), signal.head_weight) if isinstance(signal, Hidden) else signal,
            TokenTargets(counted, labels, sft_weights),
            DivergenceSpec(self.beta, self.temperature, self.divergence, self.mesh.tp, self.vocab_size),
            TopKSpec(self.k, self.tail_mode),
            FusedLinearOptions(self.chunk_tokens, self.upstream),
        )
        return Judged(total, token, counted)

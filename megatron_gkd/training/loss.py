"""From a microbatch's hidden states to its share of the step's loss.

The loss of a step is a sum over all response tokens of the global batch divided by their number. Each microbatch
contributes its plain sum; Megatron divides the reduced gradient by the reduced token count
(`calculate_per_token_loss`). So neither loss nor gradient depends on how the batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.models.label_rows import has_label, label_rows
from megatron_gkd.ops.fused_linear import fused_linear_divergence
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import TeacherSignal

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
)
"""What `Objective` adds up over tokens, in order; `cross_entropy` only over rows that the student did not generate, and
`student_cross_entropy` only over those that it did."""


class Measured(NamedTuple):
    """Of one microbatch. sums: fp64, `SUMS` in order; divergence: [N], of every label, in order."""

    sums: torch.Tensor
    divergence: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """Σ over tokens of divergence + sft_alpha · cross-entropy; plain cross-entropy where there is no teacher."""

    mesh: Mesh
    vocab_size: int
    divergence: str = "jsd"
    beta: float = 0.5
    temperature: float = 1.0
    sft_alpha: float = 0.0
    topk: int | None = None
    tail: str = "renormalize"
    chunk_tokens: int | None = None
    upstream: float | None = None
    """The gradient that the loss will get in backward, where it is known: see ``fused_linear_divergence``."""

    def __call__(
        self,
        hidden: torch.Tensor,
        head_weight: torch.Tensor,
        microbatch: Microbatch,
        signal: TeacherSignal | None,
    ) -> tuple[torch.Tensor, torch.Tensor, Measured]:
        """hidden [1, T(/TP), H_S] -> (sum of losses, number of tokens, what was measured)."""
        chosen = has_label(microbatch)
        student = label_rows(hidden, chosen, self.mesh)
        from_dataset = microbatch.from_dataset.squeeze(0)[chosen].float()
        sft_alpha = 1.0 if signal is None else self.sft_alpha
        total, token = fused_linear_divergence(
            student,
            head_weight,
            None if signal is None else signal.states,
            None if signal is None else signal.head_weight,
            divergence=self.divergence,
            beta=self.beta,
            temperature=self.temperature,
            token_weights=torch.ones_like(from_dataset),
            group=self.mesh.tp,
            vocab_size=self.vocab_size,
            labels=microbatch.labels.squeeze(0)[chosen],
            sft_weights=sft_alpha * from_dataset if sft_alpha else None,
            topk=None if signal is None else self.topk,
            tail=self.tail,
            chunk_tokens=self.chunk_tokens,
            upstream=self.upstream,
        )
        sums = torch.stack(
            [
                total.detach().double(),
                token.divergence.double().sum(),
                (token.cross_entropy.double() * from_dataset).sum(),
                (token.cross_entropy.double() * (1 - from_dataset)).sum(),
                token.teacher_entropy.double().sum(),
                token.student_entropy.double().sum(),
                token.forward_kl.double().sum(),
                token.reverse_kl.double().sum(),
                token.top1_agreement.double().sum(),
                torch.tensor(float(len(chosen)), dtype=torch.float64, device=total.device),
                from_dataset.double().sum(),
            ]
        )
        num_tokens = torch.tensor(len(chosen), dtype=torch.int, device=total.device)
        return total, num_tokens, Measured(sums, token.divergence)

"""Cheap checks of the totals of every step, which hold with any teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import holds_everywhere

_ROUNDING = 1e-2  # nats per token that a value may exceed an exact bound by
SAME_MODEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Largest divergence of a model from itself in nats per token, by its dtype: far above the rounding of any layout."""


@dataclass(frozen=True)
class Guards:
    """Check the totals (`training.loss.SUMS`) of each step.

    Attributes:
        vocab_size: number of ids that teacher and student are compared over.
        has_teacher: false for plain cross-entropy.
        same_as_teacher: dtype of a student that starts with its teacher's weights; None for other students.
    """

    vocab_size: int
    has_teacher: bool
    same_as_teacher: torch.dtype | None = None

    def check(self, step: int, totals: Mapping[str, float], microbatches: Sequence[Microbatch]) -> None:
        """Check a step before its update. All ranks must call it, with the same totals.

        Raises:
            UserError: in all ranks; the totals are not those of two distributions, or of equal models.
        """
        problem = self._problem(totals)
        if problem is None and step == 1 and self.same_as_teacher is not None:
            is_same_input = all(sample.teacher_prompt is None for one in microbatches for sample in one.samples)
            if holds_everywhere(is_same_input):  # with another prompt the same weights give other distributions
                problem = _difference_from_itself(totals, SAME_MODEL_TOLERANCE[self.same_as_teacher])
        if problem is not None:
            raise UserError(f"step {step}: {problem}; the weights keep their values of step {step - 1}")

    def _problem(self, totals: Mapping[str, float]) -> str | None:
        if not self.has_teacher:
            return None
        tokens = totals["tokens"]
        if tokens == 0:
            dropped = int(totals["dropped_tokens"])
            return f"the teacher has no distribution for any of the {dropped} response tokens" if dropped else None
        entropy, most = totals["teacher_entropy"] / tokens, math.log(self.vocab_size)
        if not -_ROUNDING <= entropy <= most + _ROUNDING:
            return (
                f"the teacher's mean entropy is {entropy:.4g} nats, which no distribution over {self.vocab_size} "
                f"tokens has (allowed are 0 to {most:.4g})"
            )
        for name in ("forward_kl", "reverse_kl"):  # Gibbs' inequality: not negative where both sum to 1
            if totals[name] / tokens < -_ROUNDING:
                return (
                    f"{name} is {totals[name] / tokens:.4g} nats, which is negative: the probabilities of the teacher "
                    "or the student do not sum to 1"
                )
        return None


def _difference_from_itself(totals: Mapping[str, float], tolerance: float) -> str | None:
    divergence = totals["divergence"] / max(totals["tokens"], 1)
    if abs(divergence) <= tolerance:
        return None
    return (
        f"teacher and student are the same model, but diverge by {divergence:.4g} nats per token (allowed are "
        f"{tolerance:g}): they do not compute the same; check for dropout in the student's config.json, and this "
        "layout, kernel and library version"
    )

"""What must hold of every step, whatever the teacher: cheap checks of the totals that all ranks have anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import holds_everywhere

_ROUNDING = 1e-2  # nats a token, where a bound holds exactly
SAME_MODEL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
"""Nats a token between a model and itself, by its type: far above the rounding of any layout."""


@dataclass(frozen=True)
class Guards:
    """Checks the totals (`training.loss.SUMS`) of each step.

    Attributes:
        vocab_size: ids that teacher and student are compared over.
        has_teacher: False for plain cross-entropy.
        same_as_teacher: the type of a student that begins as its own teacher; else None.
    """

    vocab_size: int
    has_teacher: bool
    same_as_teacher: torch.dtype | None = None

    def check(self, step: int, totals: Mapping[str, float], microbatches: Sequence[Microbatch]) -> None:
        """UserError if something is wrong with `step`, counted from 1, before the update. All ranks call it together;
        the totals are the same on all.
        """
        problem = self._problem(totals)
        if problem is None and step == 1 and self.same_as_teacher is not None:
            plain = all(sample.teacher_prompt is None for one in microbatches for sample in one.samples)
            if holds_everywhere(plain):  # where the teacher reads what the student doesn't, it judges otherwise
                problem = self._difference_from_itself(totals)
        if problem is not None:
            raise UserError(f"step {step}: {problem}; the weights keep their values of step {step - 1}")

    def _problem(self, totals: Mapping[str, float]) -> str | None:
        if not self.has_teacher:
            return None
        tokens = totals["tokens"]
        if tokens == 0:
            dropped = int(totals["dropped_tokens"])
            return f"the teacher says nothing of any of the {dropped} response tokens" if dropped else None
        entropy, most = totals["teacher_entropy"] / tokens, math.log(self.vocab_size)
        if not -_ROUNDING <= entropy <= most + _ROUNDING:
            return (
                f"the teacher's mean entropy is {entropy:.4g} nats; of {self.vocab_size} tokens it is 0 to {most:.4g}. "
                "What it gives are no distributions"
            )
        for name in ("forward_kl", "reverse_kl"):  # Gibbs' inequality: not negative where both have the mass 1
            if totals[name] / tokens < -_ROUNDING:
                return (
                    f"{name} is {totals[name] / tokens:.4g} nats; it is at least 0 where probabilities add up to 1. "
                    "The teacher's or the student's do not"
                )
        return None

    def _difference_from_itself(self, totals: Mapping[str, float]) -> str | None:
        tolerance = SAME_MODEL_TOLERANCE[self.same_as_teacher]
        divergence = totals["divergence"] / max(totals["tokens"], 1)
        if abs(divergence) <= tolerance:
            return None
        return (
            f"teacher and student are the same model, but diverge by {divergence:.4g} nats a token (allowed are "
            f"{tolerance:g}). The two do not compute the same: is there dropout in the student's config.json, or is "
            "something wrong with this layout, kernel or library?"
        )

"""The schedule of on-policy rows: a pure function of the seed and the step, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

_STREAM = 0x6C6D62  # keeps these draws apart from those of the data order, which start from the same seed


@dataclass(frozen=True)
class LambdaSchedule:
    """Draw the rows that the student generates, with λ of Agarwal et al., arXiv:2306.13649, algorithm 1.

    Attributes:
        lmbda: probability of training on a sequence that the student has just sampled, in [0, 1].
        granularity: "step" draws once for the whole global batch, "row" for each row.
        seed: non-negative.
    """

    lmbda: float
    granularity: Literal["step", "row"]
    seed: int

    def rows(self, step: int, count: int) -> np.ndarray:
        """Return bool [count]: which rows of step `step`, counted from 1, the student generates."""
        random = np.random.Generator(np.random.PCG64([self.seed, _STREAM, step - 1]))
        draws = random.random(1 if self.granularity == "step" else count)
        return np.broadcast_to(draws < self.lmbda, count)

    def any(self, step: int, count: int) -> bool:
        """Return whether the student generates any row of step `step`, counted from 1."""
        return bool(self.rows(step, count).any())

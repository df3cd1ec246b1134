"""The schedule of on-policy rows: a pure function of the seed and the step, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_gkd.config.schema import Recipe

_STREAM = 0x6C6D62  # keeps these draws apart from those of the data order, which start from the same seed


@dataclass(frozen=True)
class LambdaSchedule:
    """Draw the rows that the student generates, with λ of Agarwal et al., arXiv:2306.13649, algorithm 1.

    A generation has the rows of `steps_per_generation` consecutive steps, and is drawn as a whole. Its rows are
    `num_generations` passes over as many groups as it has prompts; each pass has one row of each group. So the
    completions of one prompt, the rows of a group, are spread over the steps as widely as they can be.

    Attributes:
        lmbda: probability of training on a sequence that the student has just sampled, in [0, 1].
        granularity: "step" draws once for a whole generation, "row" for each of its groups.
        seed: non-negative.
        steps_per_generation: optimizer steps that train on one generation.
        num_generations: completions of each prompt in a generation, the rows of a group.
    """

    lmbda: float
    granularity: Literal["step", "row"]
    seed: int
    steps_per_generation: int = 1
    num_generations: int = 1

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> LambdaSchedule:
        """Return the schedule of a run."""
        return cls(
            recipe.distill.lmbda,
            recipe.distill.lmbda_granularity,
            recipe.train.seed,
            steps_per_generation=recipe.steps_per_generation,
            num_generations=recipe.rollout.num_generations,
        )

    def generation_steps(self, step: int) -> range:
        """Return the steps of the generation that `step`, counted from 1, belongs to."""
        first = step - (step - 1) % self.steps_per_generation
        return range(first, first + self.steps_per_generation)

    def groups(self, step: int, count: int) -> np.ndarray:
        """Return bool [groups]: of which groups of the generation of `step` the student generates the rows.

        Args:
            step: any of the generation's steps, counted from 1.
            count: rows of a step.
        """
        first = self.generation_steps(step).start
        num_groups = count * self.steps_per_generation // self.num_generations
        random = np.random.Generator(np.random.PCG64([self.seed, _STREAM, first - 1]))
        draws = random.random(1 if self.granularity == "step" else num_groups)
        return np.broadcast_to(draws < self.lmbda, num_groups)

    def rows(self, step: int, count: int) -> np.ndarray:
        """Return bool [count]: which rows of step `step`, counted from 1, the student generates."""
        start = (step - self.generation_steps(step).start) * count
        return np.tile(self.groups(step, count), self.num_generations)[start : start + count]

    def any(self, step: int, count: int) -> bool:
        """Return whether the student generates any row of step `step`, counted from 1."""
        return bool(self.rows(step, count).any())

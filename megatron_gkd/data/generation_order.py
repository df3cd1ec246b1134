"""The rows of each step where a generation completes each prompt several times."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from megatron_gkd.data.lambda_schedule import LambdaSchedule


class RowSequence(Protocol):
    """An endless sequence of rows; `SampleOrder` is one."""

    epoch_length: int

    def __getitem__(self, position: int) -> int:
        """Return the row at a position, counted from 0."""
        ...


class GenerationOrder:
    """The rows of the steps, a pure function of the seed: a group of `num_generations` rows is one prompt or as many.

    Groups take rows from the sequence one after the other. A group that the student generates takes one row, which all
    its completions respond to; another takes a row of its own for each of its places, as responses of the dataset do
    not repeat.

    Args:
        rows: the sequence that they are taken from.
        schedule: which groups the student generates.
        global_batch_size: rows of a step.

    Attributes:
        epoch_length: rows of an epoch of the sequence.
    """

    def __init__(self, rows: RowSequence, schedule: LambdaSchedule, global_batch_size: int) -> None:
        self._rows, self._schedule, self._global_batch_size = rows, schedule, global_batch_size
        self._starts = [0]  # position of the first row of each generation so far
        self.epoch_length = rows.epoch_length

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the rows of step `step`, counted from 1.

        Raises:
            ValueError: `global_batch_size` is not that of the order.
        """
        if global_batch_size != self._global_batch_size:
            raise ValueError(f"global_batch_size is {global_batch_size}; the order has {self._global_batch_size}")
        schedule = self._schedule
        is_sampled = schedule.groups(step, global_batch_size)
        steps = schedule.generation_steps(step)
        places = (step - steps.start) * global_batch_size + np.arange(global_batch_size)
        passes, groups = np.divmod(places, len(is_sampled))
        sizes = self._group_sizes(step)
        first_of_group = self._start(steps) + np.cumsum(sizes) - sizes
        positions = first_of_group[groups] + np.where(is_sampled[groups], 0, passes)
        taken, places_of_taken = np.unique(positions, return_inverse=True)  # rising: the sequence holds one epoch
        rows = [self._rows[int(position)] for position in taken]
        return [rows[place] for place in places_of_taken]

    def count_rows(self, num_steps: int) -> float:
        """Return how many rows the first `num_steps` steps take; a part of those of a generation that goes on."""
        steps = self._schedule.generation_steps(num_steps + 1)
        part = (num_steps + 1 - steps.start) / len(steps)
        return self._start(steps) + part * int(self._group_sizes(steps.start).sum())

    def count_steps(self, num_rows: float) -> int:
        """Return the fewest steps that take at least `num_rows` rows."""
        schedule, step = self._schedule, 1
        while self._start(schedule.generation_steps(step + schedule.steps_per_generation)) < num_rows:
            step += schedule.steps_per_generation
        start, size = self._start(schedule.generation_steps(step)), int(self._group_sizes(step).sum())
        return step - 1 + math.ceil((num_rows - start) * schedule.steps_per_generation / size)

    def _group_sizes(self, step: int) -> np.ndarray:
        """Return int [groups], the rows that each group of the generation of `step` takes."""
        return np.where(self._schedule.groups(step, self._global_batch_size), 1, self._schedule.num_generations)

    def _start(self, steps: range) -> int:
        """Return the position of the first row of the generation with these steps."""
        generation = (steps.start - 1) // len(steps)
        while len(self._starts) <= generation:
            sizes = self._group_sizes((len(self._starts) - 1) * len(steps) + 1)
            self._starts.append(self._starts[-1] + int(sizes.sum()))
        return self._starts[generation]

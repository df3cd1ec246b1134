"""The order of rows where some are prompts alone: off-policy rows of a step are drawn from those with a response."""

from __future__ import annotations

import numpy as np

from megatron_gkd.data.generation_order import RowSequence
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.loader import StepOrder
from megatron_gkd.errors import UserError

_STREAM = 0x726573  # keeps these draws apart from those of the data order, which start from the same seed
_MOST_DRAWS = 100  # of a row with a response, before all of an epoch are looked at


class OffPolicyRows:
    """Replace prompts alone, where the student does not respond to them, by random rows with a response.

    The replacement is a pure function of the seed, the step and the place in the global batch. A row is as likely as
    it is frequent in the epoch, so that weights hold.

    Args:
        order: which rows a step has, prompts alone among them.
        rows: the sequence that rows are drawn from, in its first epoch; not one that `order` reads, which holds the
            latest epoch alone.
        has_response: bool [rows].
        schedule: to which rows of a step the student responds.

    Raises:
        UserError: no row has a response.
    """

    def __init__(self, order: StepOrder, rows: RowSequence, has_response: np.ndarray, schedule: LambdaSchedule) -> None:
        if not has_response.any():
            raise UserError(
                f"distill.lmbda = {schedule.lmbda:g}: off-policy steps need rows with a response, and data.dataset has "
                "none; set distill.lmbda = 1"
            )
        self._order, self._rows, self._has_response, self._schedule = order, rows, has_response, schedule

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the rows of step `step`, counted from 1."""
        rows = self._order.rows_of_step(step, global_batch_size)
        is_sampled = self._schedule.rows(step, global_batch_size)
        return [
            row if is_sampled[place] or self._has_response[row] else self._draw(step, place)
            for place, row in enumerate(rows)
        ]

    def _draw(self, step: int, place: int) -> int:
        """Return a random row with a response."""
        random = np.random.Generator(np.random.PCG64([self._schedule.seed, _STREAM, step - 1, place]))
        for position in random.integers(self._rows.epoch_length, size=_MOST_DRAWS).tolist():
            row = self._rows[position]
            if self._has_response[row]:
                return row
        rows = np.array([self._rows[position] for position in range(self._rows.epoch_length)])
        candidates = rows[self._has_response[rows]]
        if not len(candidates):  # a source's weight may be so small that an epoch has none of its rows
            candidates = np.flatnonzero(self._has_response)
        return int(random.choice(candidates))

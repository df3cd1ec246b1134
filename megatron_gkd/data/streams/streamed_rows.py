"""The rows of each step of a run that reads streams: one rank tokenizes them for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from megatron_gkd.data.loader import StepOrder
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.streams.feed import RowFeed, StreamState
from megatron_gkd.data.streams.tokenized import StreamedRow
from megatron_gkd.runtime.agreement import run_on_main

KEPT_STEPS = 4  # whose rows stay, beside those of the generation that is trained on and of the one before

T = TypeVar("T")
RunOnMain = Callable[[Callable[[], T]], T]
"""Runs a function on one rank and returns its result on all; see `agreement.run_on_main`."""


@dataclass(frozen=True)
class _Block:
    """As many rows as a step has. `state`: of the stream before them."""

    rows: list[StreamedRow]
    state: StreamState


@dataclass(frozen=True)
class StreamProgress:
    """Where a run goes on in a stream.

    Attributes:
        state: of the stream.
        position: number of the row that comes next, a multiple of the rows of a step.
    """

    state: StreamState
    position: int = 0

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> StreamProgress:
        """Return what `values` was called on."""
        return cls(StreamState.from_values(values), values["position"])

    def values(self) -> dict[str, Any]:
        """Return plain values."""
        return self.state.values() | {"position": self.position}


class StreamedRows:
    """The rows of one step after the other, the same on all ranks: `IndexedSamples` and their `StepOrder`.

    A row's number is its position in the endless sequence of rows that are used. They are read in order, and those of
    the newest steps are kept. All ranks must ask for a new step together: the main rank reads and tokenizes its rows,
    once for the whole run, and broadcasts them.

    Args:
        feed: where the rows come from; None on the other ranks.
        global_batch_size: rows of a step.
        progress: where to go on.
        order: which positions each step has; None: the next ones.
        steps_per_generation: steps that need their rows together.
        run_on_main: how ranks share the rows.

    Attributes:
        lengths: tokens of a row, by its number.
        num_labels: labels of a row that are not -100.
        num_patches: patches of a row's images.
    """

    def __init__(
        self,
        feed: RowFeed | None,
        global_batch_size: int,
        progress: StreamProgress,
        *,
        order: StepOrder | None = None,
        steps_per_generation: int = 1,
        run_on_main: RunOnMain[_Block] = run_on_main,
    ) -> None:
        self.feed, self._batch, self._run_on_main = feed, global_batch_size, run_on_main
        self._order = order or NextRows()
        self._steps_per_generation = steps_per_generation
        self._blocks: dict[int, _Block] = {}
        self._next, self._state = progress.position // global_batch_size, progress.state  # block, and state before it
        self.lengths = _ValueOfRow(lambda row: len(self[row].input_ids))
        self.num_labels = _ValueOfRow(lambda row: self[row].num_labels)
        self.num_patches = _ValueOfRow(lambda row: self._row(row).num_patches)

    def __getitem__(self, index: int) -> Sample:
        sample = self._row(index).sample
        if sample is None:
            raise ValueError(f"row {index} is not used")
        return replace(sample, row_id=int(index))

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the numbers of the rows of step `step`, counted from 1. All ranks must call it.

        Raises:
            UserError: in all ranks; see `RowFeed.take`.
            ValueError: the global batch has another size, or the step was read too long ago.
        """
        if global_batch_size != self._batch:
            raise ValueError(f"a step has {self._batch} rows, not {global_batch_size}")
        rows = self._order.rows_of_step(step, global_batch_size)
        while self._next <= max(rows) // self._batch:
            block = self._run_on_main(self._take)
            self._blocks[self._next] = replace(block, state=self._state)
            self._next, self._state = self._next + 1, block.state
        oldest = self._first_row(step) // self._batch - self._steps_per_generation - KEPT_STEPS
        for number in [number for number in self._blocks if number < oldest]:
            del self._blocks[number]
        if min(rows) // self._batch not in self._blocks:
            raise ValueError(f"the rows of step {step} are gone; the oldest is row {min(self._blocks) * self._batch}")
        return rows

    def progress(self, step: int) -> StreamProgress:
        """Return where a run goes on after `step`."""
        number = self._first_row(step + 1) // self._batch
        state = self._state if number == self._next else self._blocks[number].state
        return StreamProgress(state, number * self._batch)

    def close(self) -> None:
        """End the processes that tokenize."""
        if self.feed is not None:
            self.feed.close()

    def _first_row(self, step: int) -> int:
        """Return the first row of the generation that `step` belongs to."""
        first = step - (step - 1) % self._steps_per_generation
        steps = range(first, first + self._steps_per_generation)
        return min(min(self._order.rows_of_step(one, self._batch)) for one in steps)

    def _take(self) -> _Block:
        """Return the next rows, and the state after them."""
        if self.feed is None:
            raise ValueError("this rank does not read")
        rows = self.feed.take(self._batch)
        return _Block(rows, self.feed.state)

    def _row(self, number: int) -> StreamedRow:
        block, offset = divmod(int(number), self._batch)
        return self._blocks[block].rows[offset]


class NextRows:
    """The order in which each step takes the next rows of a stream."""

    epoch_length = 1
    """Not that of a source: a stream has one endless epoch."""

    def __getitem__(self, position: int) -> int:
        return position

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the numbers of the rows of step `step`, counted from 1."""
        return list(range((step - 1) * global_batch_size, step * global_batch_size))


@dataclass(frozen=True)
class _ValueOfRow:
    """A number for each row."""

    of: Callable[[int], int]

    def __getitem__(self, row: int) -> int:
        return self.of(row)

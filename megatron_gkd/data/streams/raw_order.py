"""The order in which rows are read from streams: a pure function of the seed and the number of rows read before.

Nothing but that number and the place in each source is needed to continue: the shuffle buffer is filled with one block
of rows after the other, so that its rows are those of the block that the place is in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np

from megatron_gkd.errors import UserError

CHUNK_ROWS = 32  # rows that are tokenized together; a change would change no order, but what a checkpoint means
_STREAM = 0x726177  # keeps these draws apart from others that start from the same seed


class ReadableSource(Protocol):
    """What rows are read from; `StreamSource` is one."""

    @property
    def name(self) -> str:
        """Name of the source in the recipe."""
        ...

    def read(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield the rows from `start` (counted from 0) to the end."""
        ...


@dataclass(frozen=True)
class ReadOrder:
    """How rows are ordered.

    Attributes:
        weights: share of each source in the rows, relative to the others.
        seed: non-negative.
        buffer_size: rows of one source that are permuted together; None leaves them in order.
    """

    weights: tuple[float, ...]
    seed: int
    buffer_size: int | None


@dataclass(frozen=True)
class Place:
    """The next row of a source.

    Attributes:
        epoch: passes that are complete.
        taken: rows of the present pass that were read.
        total: rows that were read in all passes.
    """

    epoch: int = 0
    taken: int = 0
    total: int = 0


@dataclass(frozen=True)
class RawRow:
    """A row as it is in its source.

    Attributes:
        source: number of the source.
        epoch: passes over the source before this one.
        index: number in the source, from 0.
        values: its columns.
    """

    source: int
    epoch: int
    index: int
    values: dict[str, Any]


@dataclass(frozen=True)
class RawChunk:
    """The next rows of all sources together. `start`: the places before them, one for each source."""

    start: tuple[Place, ...]
    rows: list[RawRow]


def read_chunks(sources: Sequence[ReadableSource], order: ReadOrder, start: Sequence[Place]) -> Iterator[RawChunk]:
    """Yield the rows of endless passes over the sources, from the places `start` on.

    Raises:
        UserError: a source has no rows, or can't be read.
    """
    places = list(start)
    rows = [_endless_rows(source, number, order, places[number]) for number, source in enumerate(sources)]
    while True:
        before, chunk = tuple(places), []
        for _ in range(CHUNK_ROWS):
            number = _next_source(order.weights, places)
            row, places[number] = next(rows[number])
            chunk.append(row)
        yield RawChunk(before, chunk)


def _next_source(weights: Sequence[float], places: Sequence[Place]) -> int:
    """Return the source that is furthest behind its share of the rows; the first of several."""
    total, whole = sum(place.total for place in places) + 1, sum(weights)
    return max(
        range(len(weights)), key=lambda number: (weights[number] / whole * total - places[number].total, -number)
    )


def _endless_rows(
    source: ReadableSource, number: int, order: ReadOrder, place: Place
) -> Iterator[tuple[RawRow, Place]]:
    """Yield the rows of a source, pass after pass, each with the place after it."""
    while True:
        is_empty = place.taken == 0
        for index, values in _rows_of_pass(source, number, order, place):
            is_empty = False
            place = Place(place.epoch, place.taken + 1, place.total + 1)
            yield RawRow(number, place.epoch, index, values), place
        if is_empty:
            raise UserError(f"{source.name}: yields nothing to train on: it has no rows")
        place = Place(place.epoch + 1, 0, place.total)


def _rows_of_pass(
    source: ReadableSource, number: int, order: ReadOrder, place: Place
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a pass that are not taken yet, with their numbers in the source."""
    size = order.buffer_size
    if size is None:
        yield from enumerate(source.read(place.taken), place.taken)
        return
    # The first block of each pass has another size, at least half of the buffer, so that other rows are together.
    first = int(_random(order.seed, number, place.epoch, 0).integers((size + 1) // 2, size + 1))
    start = 0 if place.taken < first else first + (place.taken - first) // size * size
    rows, skip = source.read(start), place.taken - start
    while block := list(islice(rows, first if start == 0 else size)):
        permutation = _random(order.seed, number, place.epoch, start + 1).permutation(len(block))
        for offset in permutation[skip:].tolist():
            yield start + offset, block[offset]
        start, skip = start + len(block), 0


def _random(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([_STREAM, *key]))

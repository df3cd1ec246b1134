"""The rows of one source, and where each was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

TEXT = "text"  # the column that holds a JSON row
_SCANNED_ROWS = 1000


@dataclass(frozen=True)
class Part:
    """Rows of one file of a source.

    Attributes:
        name: of the file, for messages.
        unit: what is counted, "line" or "row".
        size: number of its rows, blank lines among them.
    """

    name: str
    unit: str
    size: int


@dataclass(frozen=True)
class Source:
    """Rows of one source, by their indices from 0.

    Attributes:
        name: as the recipe names it, without `#n`.
        table: the rows: one column of JSON text, or the columns of an Arrow table.
        is_json: whether rows are JSON text.
        parts: the files, in the order of the rows.
        base: folder to which paths of images are relative.
        indices: int64 [rows], the number of each row in the files where the table has some of them; None: it has all.
    """

    name: str
    table: datasets.Dataset
    is_json: bool
    parts: tuple[Part, ...]
    base: Path
    indices: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table)

    def number(self, index: int) -> int:
        """Return the number in the files, from 0, of the row at `index`."""
        return index if self.indices is None else int(self.indices[index])

    def locate(self, index: int) -> str:
        """Return the place of row `index` for messages, counted from 1: `train.jsonl, line 3`."""
        return locate(self.parts, self.number(index))

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows from index `start` on, with their indices, as `RowTokenizer` takes them."""
        end = len(self) if stop is None else min(stop, len(self))
        for first in range(start, end, _SCANNED_ROWS):
            columns = self.table[first : min(first + _SCANNED_ROWS, end)]
            for offset, values in enumerate(zip(*columns.values(), strict=True)):
                yield first + offset, dict(zip(columns, values, strict=True))

    def find_rows(self) -> np.ndarray:
        """Return int64 [rows], the indices of all rows that are no blank lines."""
        if not self.is_json:
            return np.arange(len(self))
        texts = self.table.with_format("arrow")
        found = [np.zeros(0, np.int64)]
        for first in range(0, len(self), _SCANNED_ROWS):  # a trimmed copy of all rows might not fit into memory
            trimmed = pc.utf8_trim_whitespace(texts[first : first + _SCANNED_ROWS][TEXT])
            found.append(first + np.flatnonzero(pc.not_equal(trimmed, "").to_numpy()))
        return np.concatenate(found)

    def select(self, indices: np.ndarray) -> Source:
        """Return the source with the rows at these indices alone."""
        if len(indices) == len(self) and (indices == np.arange(len(self))).all():
            return self
        numbers = indices if self.indices is None else self.indices[indices]
        return replace(self, table=self.table.select(indices), indices=np.asarray(numbers, np.int64))


def locate(parts: tuple[Part, ...], number: int) -> str:
    """Return the place of row `number`, from 0, of these files."""
    for part in parts:
        if number < part.size:
            return f"{part.name}, {part.unit} {number + 1}"
        number -= part.size
    raise IndexError(f"the source has no row {number}")


def drop_nulls(value: Any) -> Any:
    """Return a row without the keys that its Arrow table has only because other rows have them."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value

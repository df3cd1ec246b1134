"""Files whose rows are read one after the other, from any row on."""

from __future__ import annotations

import io
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets

from megatron_gkd.data.json_text import split_list
from megatron_gkd.data.sources.compression import decompress, open_compressed
from megatron_gkd.data.sources.csv_rows import read_csv
from megatron_gkd.data.sources.source import TEXT

_BATCH_ROWS = 64  # that are read together from a table on disk

Rows = Generator[dict[str, Any], None, int]
"""Yields rows, and returns the number of all rows of the file."""


class StreamFile(Protocol):
    """Rows of a file, or of several files together."""

    @property
    def name(self) -> str:
        """Name of the file, for messages."""
        ...

    @property
    def unit(self) -> str:
        """What is counted, "line" or "row"."""
        ...

    def rows(self, start: int) -> Rows:
        """Read the rows from `start` (counted from 0) to the end."""
        ...


@dataclass(frozen=True)
class LineFile:
    """JSON lines. A file with a list of rows is one value, which is read whole.

    Attributes:
        name: for messages.
        path: of the file.
        compression: the ending of its name; "" for none.
        may_be_list: whether the file may be a list of rows.
    """

    name: str
    path: Path
    compression: str
    may_be_list: bool

    @property
    def unit(self) -> str:
        """What is counted."""
        return "row" if self._is_list() else "line"

    def rows(self, start: int) -> Rows:
        """Read the rows from `start` on."""
        if self._is_list():
            with self._open() as file:
                texts = list(split_list(file.read()))
            for text in texts[start:]:
                yield {TEXT: text}
            return len(texts)
        count = 0
        with self._open() as file:
            for count, line in enumerate(file, start=1):
                if count > start:
                    yield {TEXT: line.removesuffix("\n")}
        return count

    def _open(self) -> io.TextIOWrapper:
        content = open_compressed(self.path, self.compression) if self.compression else open(self.path, "rb")
        # A byte that is not UTF-8 becomes \xNN, which JSON does not know: the row is reported as not JSON.
        return io.TextIOWrapper(content, encoding="utf-8-sig", errors="backslashreplace")

    def _is_list(self) -> bool:
        if not self.may_be_list:
            return False
        with self._open() as file:
            return next((line.lstrip().startswith("[") for line in file if line.strip()), False)


@dataclass(frozen=True)
class CsvFile:
    """A table of text; see `read_csv`. A compressed one is first written to `plain`."""

    name: str
    path: Path
    compression: str
    plain: Path
    delimiter: str
    columns: Mapping[str, str]
    unit: str = "row"

    def rows(self, start: int) -> Rows:
        """Read the rows from `start` on."""
        path = self.path
        if self.compression:
            path = self.plain if self.plain.exists() else decompress(self.path, self.compression, self.plain)
        count = 0
        for count, text in enumerate(read_csv(path, self.delimiter, self.columns), start=1):
            if count > start:
                yield {TEXT: text}
        return count


@dataclass(frozen=True)
class TableFile:
    """A table that can be read anywhere, or that `datasets` streams."""

    name: str
    table: datasets.Dataset | datasets.IterableDataset
    unit: str = "row"

    def rows(self, start: int) -> Rows:
        """Read the rows from `start` on."""
        if isinstance(self.table, datasets.Dataset):
            for first in range(start, len(self.table), _BATCH_ROWS):
                columns = self.table[first : first + _BATCH_ROWS]
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))
            return len(self.table)
        count = start
        for row in self.table.skip(start):
            yield row
            count += 1
        return count

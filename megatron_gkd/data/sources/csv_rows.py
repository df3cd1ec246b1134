"""Rows of CSV files as JSON text. Every cell is text: `007` and `yes` are answers, not a number and a boolean."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_gkd.data.json_text import make_unreadable

# Keys whose values are no text.
_PARSED = frozenset(
    {
        *("messages", "conversations", "history", "tools", "images", "videos", "teacher_images"),
        *("prompt_token_ids", "response_token_ids", "teacher_prompt_token_ids", "chat_template_kwargs", "masked"),
    }
)


def read_csv(path: Path, delimiter: str, columns: Mapping[str, str]) -> Iterator[str]:
    """Yield each row of a file as JSON text, which has no key for an empty cell.

    A row with another number of cells than the header is one that `decode_json` refuses.

    Args:
        path: of a file in UTF-8, whose first row has the names of the columns; a column without a name is left out.
        delimiter: between the cells.
        columns: new names of the columns, which decide whether cells are parsed as JSON; the names are not changed.

    Raises:
        ValueError: the file is no such table.
    """
    with open(path, encoding="utf-8-sig", newline="") as file, _long_cells():
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            repeated = sorted({name for name in header if name and header.count(name) > 1})
            if repeated:
                raise ValueError(f"two columns are named {repeated[0]}")
            for cells in reader:
                if not cells:  # a blank line
                    continue
                if len(cells) != len(header):
                    yield make_unreadable(
                        f"line {reader.line_num} has {len(cells)} cells, and the header {len(header)}; cells with "
                        "a delimiter or a line break need quotes"
                    )
                    continue
                row = {name: cell for name, cell in zip(header, cells, strict=True) if name and cell.strip()}
                yield json.dumps({name: _parse(columns.get(name, name), cell) for name, cell in row.items()})
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 after line {reader.line_num} ({error.reason})") from error


def _parse(key: str, cell: str) -> Any:
    if key not in _PARSED:
        return cell
    try:
        return json.loads(cell)
    except json.JSONDecodeError:
        return cell  # the check of the row names the key and its type


@contextmanager
def _long_cells() -> Iterator[None]:
    """Allow cells of any length; the module's limit is 128 KiB, for the whole process."""
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)

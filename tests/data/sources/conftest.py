"""Rows in files of every kind, and a source opened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.data.sources import TEXT, Source, drop_nulls, open_source

ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]


@pytest.fixture
def lines() -> bytes:
    """`ROWS` as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


@pytest.fixture
def opened(tmp_path: Path) -> Callable[..., Source]:
    """`opened(name, use_hf=False)`: the source of this name, with a scratch folder of its own."""
    count = iter(range(1000))

    def make(name: Path | str, **options: Any) -> Source:
        return open_source(str(name), tmp_path / f"scratch{next(count)}", **options)

    return make


@pytest.fixture
def rows_of() -> Callable[[Source], list[dict[str, Any]]]:
    """The rows of a source, decoded."""

    def rows(source: Source) -> list[dict[str, Any]]:
        raw = [row for _, row in source.iterate()]
        return [json.loads(row[TEXT]) if source.is_json else drop_nulls(row) for row in raw]

    return rows

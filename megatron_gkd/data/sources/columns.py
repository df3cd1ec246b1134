"""Check that a source has the columns that `columns` renames."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches

from megatron_gkd.data.sources.source import TEXT, Source
from megatron_gkd.errors import UserError


def require_columns(source: Source, columns: Mapping[str, str]) -> None:
    """Check that each column is in a row of the source; all rows are read only where one is in none.

    Raises:
        UserError: no row has a column.
    """
    missing, found = set(columns), dict.fromkeys(() if source.is_json else source.table.column_names)
    missing -= found.keys()
    if source.is_json and missing:
        for _, raw in source.iterate():
            keys = _keys(raw[TEXT])
            found |= dict.fromkeys(keys)
            missing -= keys
            if not missing:
                return
    for name in columns:
        if name in missing:
            near = get_close_matches(name, found, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            names = ", ".join(found) or "none"
            raise UserError(f"data.columns = {name}: no row of {source.name} has this key; its keys are {names}{hint}")


def _keys(text: str) -> set[str]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return set()
    return set(row) if isinstance(row, dict) else set()

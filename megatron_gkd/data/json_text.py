"""Rows as JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from megatron_gkd.data.bad_row import BadRow

_UNREADABLE = "\0unreadable row: "  # begins the text of a row that is none in its file
_SPACE = re.compile(r"[ \t\n\r]*")


class _RepeatedKey(ValueError):
    pass


def decode_json(text: str) -> Any:
    """Parse a row's JSON text.

    Raises:
        BadRow: "not JSON", "not a row of the table", or "conflicting keys": an object has a key twice.
    """
    if text.startswith(_UNREADABLE):
        raise BadRow("not a row of the table", text.removeprefix(_UNREADABLE))
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _RepeatedKey as error:
        raise BadRow("conflicting keys", str(error)) from error
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise BadRow("not JSON", "it is nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise BadRow("not JSON", str(error)) from error


def make_unreadable(detail: str) -> str:
    """Return a text for which `decode_json` raises an error with this detail."""
    return _UNREADABLE + detail


def split_list(text: str) -> Iterator[str]:
    """Yield the JSON text of each item of a JSON list.

    Raises:
        ValueError: the text is no such list.
    """
    decoder, position = json.JSONDecoder(), _skip(text, 0)
    if text[position : position + 1] != "[":
        raise json.JSONDecodeError("Expecting a list", text, position)
    position = _skip(text, position + 1)
    is_at_end = text[position : position + 1] == "]"
    while not is_at_end:
        _, end = decoder.raw_decode(text, position)
        yield text[position:end]
        position = _skip(text, end)
        is_at_end = text[position : position + 1] == "]"
        if not is_at_end:
            if text[position : position + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
            position = _skip(text, position + 1)
    if _skip(text, position + 1) != len(text):
        raise json.JSONDecodeError("Extra data", text, position + 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise _RepeatedKey(f"an object has the key {repeated} {keys.count(repeated)} times")
    return made


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return position if found is None else found.end()

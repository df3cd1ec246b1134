"""The errors of rows that are not trained on."""

from __future__ import annotations

from typing import Any

from megatron_gkd.errors import one_line


class BadRow(Exception):
    """A row that cannot be trained on.

    Args:
        reason: what such rows are counted by.
        detail: what is wrong with this row.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(one_line(f"{reason}: {detail}"))
        self.reason = reason
        self.detail = detail


class DroppedRow(Exception):
    """A row that is not used, without being wrong in itself. `reason` is what such rows are counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


_NAMES = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", bool: "true or false"}


def require(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """Return `value`, the content of the key `name`.

    Raises:
        BadRow: "wrong type": it is not of type `kind`.
    """
    if isinstance(value, kind):
        return value
    kinds = kind if isinstance(kind, tuple) else (kind,)
    expected = " or ".join(_NAMES[kind] for kind in kinds)
    actual = "missing" if value is None else name_type(value)
    raise BadRow("wrong type", f"{name} must be {expected}, but is {actual}")


def name_type(value: Any) -> str:
    """Return JSON's name of the type of a value: `a list`."""
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)

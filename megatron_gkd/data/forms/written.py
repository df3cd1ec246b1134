"""Lists and objects that a row holds as text, as CSV files do."""

from __future__ import annotations

import ast
import json
from typing import Any

from megatron_gkd.data.bad_row import BadRow


def read_written(value: Any, name: str) -> Any:
    """Return the list or object that `value` holds as JSON or Python text; any other value as it is.

    Args:
        value: of a row's key.
        name: of the key, for messages.

    Raises:
        BadRow: "wrong type": the text is neither.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
    try:
        return ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadRow("wrong type", f"{name} must be a list, but is a string that is not JSON: {reason}") from error

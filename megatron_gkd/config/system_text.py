"""The system message that a recipe names: a text, or a file with one."""

import re
from pathlib import Path

from megatron_gkd.errors import UserError

_IS_PATH = re.compile(r"\S*/\S*|.*\.(txt|md|jinja2?|j2)", re.IGNORECASE)


def read_system(value: str | None) -> str | None:
    """Return the system message of `data.system`; None for none.

    Args:
        value: the text itself, or the path of a file with it, whose last line break is left out.

    Raises:
        UserError: the value is the path of no file, or the file holds no text.
    """
    if value is None:
        return None
    if "\n" in value or not _is_file(value):
        if _IS_PATH.fullmatch(value.strip()):
            raise _problem(value, "must be a text, or a file that exists; it is no file, and looks like a path")
        text = value
    else:
        try:
            text = Path(value).read_text(encoding="utf-8-sig").removesuffix("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise _problem(value, f"cannot be read ({reason}); must be a text, or a file with one") from error
    if not text.strip():
        raise _problem(value, "holds no text; leave it out where there is no system message")
    return text


def _problem(value: str, reason: str) -> UserError:
    return UserError(f"data.system = {value}: {reason}")


def _is_file(value: str) -> bool:
    try:
        return Path(value).is_file()
    except (OSError, ValueError):  # too long for a name, or with a NUL
        return False

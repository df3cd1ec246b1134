"""Read amounts of memory: `80GB`, `74.5GiB`, `512MiB`."""

from __future__ import annotations

import re

FORMS = "as 80GB, 74.5GiB or 512MiB; a GB is 10^9 bytes and a GiB is 2^30"
_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_FORM = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-zA-Z]*)")


def parse_bytes(text: str) -> int:
    """Return a number of bytes from its text.

    Raises:
        ValueError: the text is none, or is less than one byte.
    """
    found = _FORM.fullmatch(text.strip())
    unit = None if found is None else _UNITS.get(found[2].upper())
    if found is None or unit is None:
        raise ValueError(f"{text}: not an amount of memory; must be {FORMS}")
    amount = round(float(found[1]) * unit)
    if amount < 1:
        raise ValueError(f"{text}: less than one byte; must be {FORMS}")
    return amount

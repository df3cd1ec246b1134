"""Parse lengths of time in the forms of people and of Slurm, with the standard library alone."""

from __future__ import annotations

import re

FORMS = "seconds, 90m, 11h30m, [days-]hours:minutes:seconds"
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_WITH_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


def parse_duration(text: str) -> float:
    """Return the seconds of a text in one of `FORMS`.

    Raises:
        ValueError: it is in none of them.
    """
    text = text.strip().lower()
    match = (_WITH_UNITS if text else _CLOCK).fullmatch(text) or _CLOCK.fullmatch(text)
    if match:
        return float(sum(int(part or 0) * unit for part, unit in zip(match.groups(), _UNITS.values(), strict=True)))
    return float(text)

"""Counts, rates and durations as text."""

from __future__ import annotations

_UNITS = ("", "K", "M", "B", "T")


def format_count(count: float) -> str:
    """Return a count with three significant digits and its unit: `987`, `12.3 K`, `1.72 B`."""
    unit = 0
    while unit < len(_UNITS) - 1 and count >= (999.5 if unit else 1000):
        count, unit = count / 1000, unit + 1
    if not unit:
        return f"{count:.0f}"
    decimals = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:.{decimals}f} {_UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """Return a duration: `4.2 s`, `3 min 5 s`, `1 h 12 min`."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, remainder = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {remainder} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_rate(rate: float, unit: str) -> str:
    """Return how many of `unit` are done in a second, with one decimal below 10: `2400 rows/s`."""
    return f"{rate:.{1 if rate < 10 else 0}f} {unit}/s"

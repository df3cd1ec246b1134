"""Statistics of lengths in tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_BINS = 10
_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Bin:
    """Number of `rows` whose length is from `start` to `end`, both included."""

    start: int
    end: int
    rows: int


@dataclass(frozen=True)
class LengthSummary:
    """Smallest, median, 95th percentile and largest of some lengths."""

    min: int
    median: float
    p95: float
    max: int

    @classmethod
    def from_lengths(cls, lengths: np.ndarray) -> LengthSummary:
        """Summarize int [N], N >= 1."""
        median, p95 = np.percentile(lengths, (50, 95))
        return cls(int(lengths.min()), float(median), float(p95), int(lengths.max()))

    def text(self) -> str:
        """Return one line."""
        return f"min {self.min}, median {self.median:g}, 95 % up to {self.p95:g}, max {self.max}"

    def to_json(self) -> dict[str, Any]:
        """Return the numbers by their names."""
        return asdict(self)


def make_histogram(lengths: np.ndarray) -> list[Bin]:
    """Return at most ten bins of equal width that hold all of int [N], N >= 1."""
    least, most = int(lengths.min()), int(lengths.max())
    width = -(-(most - least + 1) // _BINS)
    starts = range(least, most + 1, width)
    counts = np.bincount((lengths - least) // width, minlength=len(starts))
    return [Bin(start, min(start + width - 1, most), int(count)) for start, count in zip(starts, counts, strict=True)]


def format_histogram(bins: list[Bin]) -> list[str]:
    """Return a line for each bin: `  12-15    3 ###`."""
    labels = [f"{one.start}-{one.end}" for one in bins]
    most = max(one.rows for one in bins)
    width, digits = max(map(len, labels)), len(str(most))
    return [
        f"{label:>{width}}  {one.rows:>{digits}} {'#' * -(-one.rows * _BAR // most)}".rstrip()
        for label, one in zip(labels, bins, strict=True)
    ]

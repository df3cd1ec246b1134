"""Counts of the rows that were read, used and dropped, with reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

TOO_LONG = "longer than max_length"
TOO_LONG_FOR_TEACHER = "longer than teacher_max_length with its teacher_prompt"
NO_ROOM = "prompt without room for a completion"
NO_ROOM_FOR_TEACHER = "teacher_prompt without room for a completion"
IMAGE_CUT = "too long, and truncation would cut an image off"
NOTHING_TO_LEARN = "no response token left"
MASKED = "masked"
PREPROCESSOR = "dropped by the preprocessor"


@dataclass(frozen=True)
class DataReport:
    """Counts of one data source, or of several together.

    Attributes:
        rows_read: rows in the files; blank lines are not rows.
        rows_used: rows that became samples.
        dropped: number of dropped rows by reason.
        shortened: number of used rows whose prompt lost its start, to leave room for a completion.
        first_bad_row: place and reason of the first bad row, if there is one.
        images: number of images in used rows.
    """

    rows_read: int
    rows_used: int
    dropped: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    first_bad_row: str | None = None
    images: int = 0

    @staticmethod
    def merge(reports: Iterable[DataReport]) -> DataReport:
        """Add up the counts of several sources."""
        reports = list(reports)
        dropped: Counter[str] = Counter()
        for report in reports:
            dropped.update(report.dropped)
        return DataReport(
            rows_read=sum(report.rows_read for report in reports),
            rows_used=sum(report.rows_used for report in reports),
            dropped=dict(dropped),
            shortened=sum(report.shortened for report in reports),
            first_bad_row=next((report.first_bad_row for report in reports if report.first_bad_row), None),
            images=sum(report.images for report in reports),
        )

    def summary(self) -> str:
        """Return one line: `8 of 10 rows used; dropped: 2 not JSON (first bad row: a.jsonl, line 3: not JSON: ...)`."""
        line = f"{self.rows_used} of {self.rows_read} rows used"
        if self.images:
            line += f", with {self.images} images"
        if self.dropped:
            line += "; dropped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        if self.shortened:
            line += f"; prompts shortened to leave room for a completion: {self.shortened}"
        if self.first_bad_row:
            line += f" (first bad row: {self.first_bad_row})"
        return line

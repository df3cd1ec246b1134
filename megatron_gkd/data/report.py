"""Counts of the rows that were read, used and dropped, with reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

NO_RESPONSE = "without a response, which validation needs"
TOO_LONG = "longer than max_length"
TOO_LONG_FOR_TEACHER = "longer than teacher_max_length with its teacher_prompt"
NO_ROOM = "prompt longer than max_prompt_length"
NO_ROOM_FOR_TEACHER = "teacher_prompt without room for a completion"
IMAGE_CUT = "too long, and truncation would cut an image off"
NOTHING_TO_LEARN = "no response token left"
MASKED = "masked"
WEIGHTLESS = "without a token whose loss has a weight"
PREPROCESSOR = "dropped by the preprocessor"


@dataclass(frozen=True)
class DataReport:
    """Counts of one data source, or of several together.

    Attributes:
        rows_read: rows in the files; blank lines are not rows.
        rows_used: rows that became samples.
        dropped: number of dropped rows by reason.
        shortened: number of used rows whose prompt lost its start, to be within max_prompt_length.
        first_bad_row: place and reason of the first bad row, if there is one.
        images: number of images in used rows.
        forms: number of used rows by the form that they are written in.
        truncated: number of used rows that were longer than a limit and have lost tokens.
        sources: the reports of several sources by their names; empty for one source.
        pieces: number of samples beyond the first of each row, of those that were split.
        conversations: number of used rows that are turns of a chat template, whose completions its end of a turn ends.
        special: number of used rows with a special token in the content of a message.
        first_special: place of the first of these, and what it has.
        drawn: number of rows of `#n` where it repeats some; 0 where each row is used once.
    """

    rows_read: int
    rows_used: int
    dropped: dict[str, int] = field(default_factory=dict)
    shortened: int = 0
    first_bad_row: str | None = None
    images: int = 0
    pieces: int = 0
    forms: dict[str, int] = field(default_factory=dict, compare=False)
    truncated: int = field(default=0, compare=False)
    sources: dict[str, DataReport] = field(default_factory=dict, compare=False)
    conversations: int = field(default=0, compare=False)
    special: int = field(default=0, compare=False)
    first_special: str | None = field(default=None, compare=False)
    drawn: int = field(default=0, compare=False)

    @staticmethod
    def merge(reports: Iterable[DataReport]) -> DataReport:
        """Add up the counts of several sources."""
        reports = list(reports)
        dropped: Counter[str] = Counter()
        forms: Counter[str] = Counter()
        for report in reports:
            dropped.update(report.dropped)
            forms.update(report.forms)
        drawn = sum(report.drawn or report.rows_used for report in reports)
        return DataReport(
            rows_read=sum(report.rows_read for report in reports),
            rows_used=sum(report.rows_used for report in reports),
            dropped=dict(dropped),
            shortened=sum(report.shortened for report in reports),
            first_bad_row=next((report.first_bad_row for report in reports if report.first_bad_row), None),
            images=sum(report.images for report in reports),
            pieces=sum(report.pieces for report in reports),
            forms=dict(forms),
            truncated=sum(report.truncated for report in reports),
            conversations=sum(report.conversations for report in reports),
            special=sum(report.special for report in reports),
            first_special=next((report.first_special for report in reports if report.first_special), None),
            drawn=drawn if any(report.drawn for report in reports) else 0,
        )

    @staticmethod
    def of_sources(names: Sequence[str], reports: Sequence[DataReport]) -> DataReport:
        """Add up the counts of the sources of these names; one that is named again is numbered."""
        sources: dict[str, DataReport] = {}
        for position, (name, report) in enumerate(zip(names, reports, strict=True)):
            number = names[: position + 1].count(name)
            sources[name if number == 1 else f"{name} ({number})"] = report
        return replace(DataReport.merge(reports), sources=sources)

    def summary(self) -> str:
        """Return one line: `8 of 10 rows used; dropped: 2 not JSON (first bad row: a.jsonl, line 3: not JSON: ...)`."""
        line = f"{self.rows_used} of {self.rows_read} rows used"
        if self.images:
            line += f", with {self.images} images"
        if self.drawn:
            line += f", {self.drawn} with repeats"
        if self.pieces:
            line += f", as {self.rows_used + self.pieces} sequences"
        if self.dropped:
            line += "; dropped: " + ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
        if self.shortened:
            line += f"; prompts shortened to max_prompt_length: {self.shortened}"
        if self.first_bad_row:
            line += f" (first bad row: {self.first_bad_row})"
        return line

    def remark(self) -> str | None:
        """Return what is unusual in the rows that are used, for a warning."""
        if not self.special:
            return None
        rows = "1 row has" if self.special == 1 else f"{self.special} rows have"
        return (
            f"{rows} special tokens in the content of a message, which the model reads as such (first: "
            f"{self.first_special}); a data.preprocessor can remove them"
        )

    def describe_forms(self) -> list[str]:
        """Return a line for each source: `a.jsonl: 9 messages, 3 query + response; 2 of 14 rows dropped`."""
        lines = []
        for name, one in self.sources.items():
            forms = sorted(one.forms.items(), key=lambda item: -item[1])
            known = ", ".join(f"{count} {form}" for form, count in forms)
            dropped = one.rows_read - one.rows_used
            known += f", {one.drawn} with repeats" if one.drawn else ""
            lines.append(f"{name}: {known}" + (f"; {dropped} of {one.rows_read} rows dropped" if dropped else ""))
        return lines

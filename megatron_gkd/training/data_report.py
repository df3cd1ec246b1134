"""The rows of a split as the model reads them, and their lengths, without weights and teachers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.build import build_dataset
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.lengths import LengthSummary, format_histogram, make_histogram
from megatron_gkd.data.report import TOO_LONG, DataReport
from megatron_gkd.data.row_view import mark_spans, view_sample
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.reporting.start_report import Line, format_lines, group_lines
from megatron_gkd.training.describe_rows import describe_sample
from megatron_gkd.training.setup import open_student, row_options
from megatron_gkd.training.streamed_sample import SAMPLED_ROWS, StreamedSample, sample_streams

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class SplitReport:
    """The rows of a split.

    Attributes:
        split: which one.
        dataset: its rows.
        report: their counts.
        tokenizer: the student's.
        max_length: most tokens of a row.
        is_sample: whether the split has more rows, which are streamed.
    """

    split: Split
    dataset: TokenizedDataset | StreamedSample
    report: DataReport
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    is_sample: bool = False

    def lines(self, show: int) -> list[str]:
        """Return the report as text, with the first `show` rows."""
        texts = [line for index in range(min(show, len(self.dataset))) for line in self._row_lines(index)]
        return [*texts, format_lines([*self._facts()])]

    def to_json(self, show: int) -> dict[str, Any]:
        """Return the report as JSON values, with the first `show` rows."""
        return {
            "split": self.split,
            "is_sample": self.is_sample,
            "max_length": self.max_length,
            "report": asdict(self.report),
            "share_above_max_length": self._share_above,
            "lengths": LengthSummary.from_lengths(self.dataset.lengths).to_json(),
            "prompt_lengths": LengthSummary.from_lengths(self._prompt_lengths).to_json(),
            "histogram": [asdict(one) for one in make_histogram(self.dataset.lengths)],
            "rows": [self._row_json(index) for index in range(min(show, len(self.dataset)))],
        }

    @cached_property
    def _prompt_lengths(self) -> np.ndarray:
        return self.dataset.measure_prompts()

    @property
    def _share_above(self) -> float:
        report = self.report
        return (report.dropped.get(TOO_LONG, 0) + report.truncated) / max(report.rows_read, 1)

    def _row_lines(self, index: int) -> Iterator[str]:
        sample = self.dataset[index]
        name = f"row {index + 1} ({self.dataset.locate(index)})"
        views = {name: sample}
        if (view := teacher_view(sample)) is not sample:
            views[f"{name} for the teacher"] = view
        for name, one in views.items():
            first, *text = describe_sample(one, self.tokenizer)
            yield from (f"{name}: {first}", *(f"  {line}" for line in text), "")

    def _row_json(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        row = {
            "place": self.dataset.locate(index),
            **self._tokens_json(sample),
            "images": len(sample.images),
            "tag": sample.tag,
        }
        view = teacher_view(sample)
        return row if view is sample else row | {"teacher": self._tokens_json(view)}

    def _tokens_json(self, sample: Sample) -> dict[str, Any]:
        spans = view_sample(sample, self.tokenizer)
        weights = sample.label_weights
        return {
            "input_ids": sample.input_ids.tolist(),
            "labels": sample.labels.tolist(),
            **({} if weights is None else {"label_weights": weights.tolist()}),
            "text": mark_spans(spans),
            "spans": [asdict(span) for span in spans],
        }

    def _facts(self) -> Iterator[Line]:
        lengths, report = self.dataset.lengths, self.report
        yield "rows", report.summary()
        if self.is_sample:
            yield "", f"of these streams the first {len(self.dataset)} rows are read alone, in the order of a run"
        if (remark := report.remark()) is not None:
            yield "warning", remark
        yield from group_lines("forms", report.describe_forms())
        yield "tokens", f"{int(lengths.sum())}, {int(self.dataset.num_labels.sum())} of them trained on"
        yield "lengths", LengthSummary.from_lengths(lengths).text()
        above = f"{self._share_above:.1%} of the rows were above max_length = {self.max_length}"
        yield "", f"{above}: {report.dropped.get(TOO_LONG, 0)} dropped, {report.truncated} cut"
        yield "prompts", LengthSummary.from_lengths(self._prompt_lengths).text()
        if self.dataset.teacher_lengths.any():
            own = self.dataset.teacher_lengths[self.dataset.teacher_lengths > 0]
            yield "teacher", f"{len(own)} rows with a teacher_prompt: {LengthSummary.from_lengths(own).text()}"
        yield from group_lines("histogram", format_histogram(make_histogram(lengths)))


def read_split(recipe: Recipe, split: Split, show: int = 0) -> SplitReport:
    """Tokenize the rows of a split, or open them from the cache, on this process alone.

    Args:
        recipe: of the rows.
        split: which of them.
        show: number of rows that are shown, which streams must give.

    Raises:
        UserError: the student or the rows cannot be read, or a row is bad.
    """
    student = open_student(recipe)
    max_length = recipe.data.max_length
    if split == "train" and recipe.data.streaming:
        sample, counts = sample_streams(recipe, student, max(show, SAMPLED_ROWS))
        return SplitReport(split, sample, counts, student.tokenizer, max_length, is_sample=True)
    options = row_options(recipe, student, split)
    dataset, report = build_dataset(recipe.data, split, student.tokenizer, options)
    return SplitReport(split, dataset, report, student.tokenizer, max_length)

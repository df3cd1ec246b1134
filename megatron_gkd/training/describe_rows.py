"""Descriptions of the rows of a split, for people."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.row_view import END, START, mark_spans, view_sample
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.streams.tokenized import StreamedRow
from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.reporting.start_report import RowsLine, format_lines, group_lines

_EXAMPLE_CHARACTERS = 800  # of each part of the row in the report of a run's start


def describe_rows(
    split: str, dataset: TokenizedDataset, report: DataReport, tokenizer: PreTrainedTokenizerBase
) -> RowsLine:
    """Return what the report at a run's start says of a split, `training` or `validation`.

    The forms of the rows, and the first row with what is trained on, are those of `training` alone.
    """
    tokens = int(dataset.lengths.sum())
    if split != "training":
        return RowsLine(split, report.summary(), tokens, remark=report.remark())
    example = describe_sample(dataset[0], tokenizer, _EXAMPLE_CHARACTERS)
    return RowsLine(split, report.summary(), tokens, report.describe_forms(), example, report.remark())


def log_first_rows(tokenizer: PreTrainedTokenizerBase, rows: Sequence[StreamedRow], report: DataReport) -> None:
    """Log what is known of streamed rows when the first of them are drawn: their forms, and one row.

    Args:
        tokenizer: the student's.
        rows: those of the first step of this process.
        report: their counts.
    """
    lines = group_lines("forms", report.describe_forms())
    if rows and rows[0].sample is not None:
        lines += group_lines("first row", describe_sample(rows[0].sample, tokenizer, _EXAMPLE_CHARACTERS))
    LOGGER.info("\n".join(["the first streamed rows:", format_lines(lines)]))
    if (remark := report.remark()) is not None:
        LOGGER.warning(f"training: {remark}")


def describe_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase, limit: int | None = None) -> list[str]:
    """Return a line about a row, and those of its text, with marks around what is trained on.

    Args:
        sample: the row as the student, or the teacher, reads it.
        tokenizer: the student's.
        limit: most characters of each part; None: all.
    """
    text = mark_spans(view_sample(sample, tokenizer), limit)
    return [f"{_count(sample)}:", *text.splitlines()]


def _count(sample: Sample) -> str:
    facts = [f"{len(sample.input_ids)} tokens"]
    if sample.images:
        facts.append(f"{len(sample.images)} image{'s' * (len(sample.images) > 1)}")
    if sample.tag is not None:
        facts.append(f"tag {sample.tag}")
    if not sample.num_labels:
        return ", ".join([*facts, "a prompt alone"])
    return ", ".join([*facts, f"{sample.num_labels} trained on, between {START} and {END}"])

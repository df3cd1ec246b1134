"""Tokenization of raw rows to token ids and labels, with a reason for each row that is dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.plugins import Preprocessor, find_preprocessor, load_plugins
from megatron_gkd.data.prompt import PromptLimits, prompt_length
from megatron_gkd.data.report import (
    MASKED,
    NO_ROOM,
    NO_ROOM_FOR_TEACHER,
    NOTHING_TO_LEARN,
    PREPROCESSOR,
    TOO_LONG,
    TOO_LONG_FOR_TEACHER,
)
from megatron_gkd.data.rows import BadRow, Row, TokenIds, parse_row, read_tag
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.sources import TEXT, decode_json, drop_nulls
from megatron_gkd.data.teacher_view import extract_teacher_prompt, truncate_teacher_prompt
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.data.truncation import truncate

BLANK = "blank line"
_EMPTY = np.zeros(0, dtype=np.int64)

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),  # labels that are not -100
        "teacher_prompt": datasets.List(datasets.Value("int32")),  # empty where the row has none
        "teacher_length": datasets.Value("int32"),  # of the whole sequence after it; 0 where the row has none
        "tag": datasets.Value("string"),  # empty where no key is configured
        "shortened": datasets.Value("bool"),  # the prompt lost its start, to leave room for a completion
        "dropped": datasets.Value("string"),  # why the row is not used; empty for one that is
        "error": datasets.Value("string"),  # what is wrong with the row; empty unless it is a bad row
    }
)
STATUS = ("shortened", "dropped", "error")  # columns that are not stored with the sample


@dataclass(frozen=True)
class RowOptions:
    """What a run requires of its rows, beside the recipe's `data` section.

    Attributes:
        allows_prompts: a row may be a prompt alone, which the student responds to.
        prompt_limits: longer prompts are shortened, or their rows dropped, by `truncation_strategy`; None where the
            student responds to no row.
        tag_key: the rows' key whose value is `Sample.tag`, which every row must have; None for no tags.
        vocab_size: number of ids that every model of the run can read: a row with another one is bad; None: the number
            of the tokenizer's tokens.
    """

    allows_prompts: bool = False
    prompt_limits: PromptLimits | None = None
    tag_key: str | None = None
    vocab_size: int | None = None


class _DroppedRow(Exception):
    """A row that is not used, without being wrong in itself. `reason` is what such rows are counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class _Tokens:
    """A row's token ids and shifted labels, both int64 [L], and the token ids of the teacher's own prompt."""

    input_ids: np.ndarray
    labels: np.ndarray
    teacher_prompt: np.ndarray | None

    @property
    def teacher_length(self) -> int:
        """Tokens that the teacher reads; 0 where it reads the same as the student."""
        response_length = len(self.input_ids) - prompt_length(self.labels)
        return 0 if self.teacher_prompt is None else len(self.teacher_prompt) + response_length

    def truncate(self, input_ids: np.ndarray, labels: np.ndarray, strategy: str) -> _Tokens:
        """Return the row with these truncated ids and labels, and the teacher's prompt truncated to match."""
        teacher_prompt = self.teacher_prompt
        if teacher_prompt is not None:
            teacher_prompt = truncate_teacher_prompt(teacher_prompt, self.labels, labels, strategy)
        return replace(self, input_ids=input_ids, labels=labels, teacher_prompt=teacher_prompt)


@dataclass
class RowTokenizer:
    """Tokenize batches of rows. It is pickled into the worker processes, where it loads the plugins itself."""

    tokenizer: PreTrainedTokenizerBase
    is_json: bool
    section: DataSection
    options: RowOptions

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of `FEATURES` for the columns of a source, one row for each."""
        columns = list(batch)
        rows = [self._record(dict(zip(columns, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in FEATURES}

    def _record(self, raw: dict[str, Any]) -> dict[str, Any]:
        if self.is_json and not raw[TEXT].strip():
            return _dropped_record(BLANK)
        try:
            row, tag = self._parse(raw)
            whole = self._tokenize(row)
            shortened = self._shorten_prompt(whole)
            tokens = self._truncate(shortened)
        except BadRow as bad:
            return _dropped_record(bad.reason, str(bad))
        except _DroppedRow as dropped:
            return _dropped_record(dropped.reason)
        return {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "length": len(tokens.input_ids),
            "num_labels": int((tokens.labels != IGNORED_LABEL).sum()),
            "teacher_prompt": _EMPTY if tokens.teacher_prompt is None else tokens.teacher_prompt,
            "teacher_length": tokens.teacher_length,
            "tag": tag,
            "shortened": shortened is not whole,
            "dropped": "",
            "error": "",
        }

    def _parse(self, raw: dict[str, Any]) -> tuple[Row, str]:
        """Return the row in one of its checked forms, and its tag."""
        row = self._preprocess(decode_json(raw[TEXT]) if self.is_json else drop_nulls(raw))
        if row is None:
            raise _DroppedRow(PREPROCESSOR)
        parsed = parse_row(row, allows_prompts=self.options.allows_prompts)
        if isinstance(parsed, TokenIds) and parsed.masked:
            raise _DroppedRow(MASKED)
        return parsed, read_tag(row, self.options.tag_key) if self.options.tag_key else ""

    def _tokenize(self, row: Row) -> _Tokens:
        input_ids, labels = self._render(row)
        if row.teacher_prompt is None:
            return _Tokens(input_ids, labels, None)
        return _Tokens(input_ids, labels, extract_teacher_prompt((input_ids, labels), self._render(row.for_teacher())))

    def _shorten_prompt(self, tokens: _Tokens) -> _Tokens:
        """Return the row with a prompt that leaves room for a completion; the same object if it does already."""
        limits = self.options.prompt_limits
        surplus = 0 if limits is None else prompt_length(tokens.labels) - limits.student
        if surplus <= 0:
            return tokens
        if self.section.truncation_strategy == "delete":
            raise _DroppedRow(NO_ROOM)
        return tokens.truncate(tokens.input_ids[surplus:], tokens.labels[surplus:], "left")

    def _truncate(self, tokens: _Tokens) -> _Tokens:
        """Return the row within the limits of the student's and the teacher's sequences."""
        section, limits = self.section, self.options.prompt_limits
        kept = truncate(tokens.input_ids, tokens.labels, section.max_length, section.truncation_strategy)
        if kept is None:
            raise _DroppedRow(TOO_LONG)
        input_ids, labels = kept
        if (labels == IGNORED_LABEL).all() and (tokens.labels != IGNORED_LABEL).any():
            raise _DroppedRow(NOTHING_TO_LEARN)
        tokens = tokens.truncate(input_ids, labels, section.truncation_strategy)
        if tokens.teacher_prompt is not None and limits is not None and len(tokens.teacher_prompt) > limits.teacher:
            raise _DroppedRow(NO_ROOM_FOR_TEACHER)
        if tokens.teacher_length > (section.teacher_max_length or section.max_length):
            raise _DroppedRow(TOO_LONG_FOR_TEACHER)
        return tokens

    def _preprocess(self, row: Any) -> Any:
        if self._preprocessor is None:
            return row
        try:
            return self._preprocessor(row)
        except Exception as error:  # a user's own code
            message = f"{self.section.preprocessor!r} raised {type(error).__name__}: {error}"
            raise BadRow("preprocessor failed", message) from error

    @cached_property
    def _preprocessor(self) -> Preprocessor | None:
        load_plugins(self.section.external_plugins)
        return find_preprocessor(self.section.preprocessor) if self.section.preprocessor else None

    @cached_property
    def _render(self) -> RowRenderer:
        section = self.section
        return RowRenderer(self.tokenizer, section.loss_on, section.chat_template_kwargs, self.options.vocab_size)

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without what is cached: a plugin's function cannot be pickled; a worker loads its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_preprocessor", "_render")}


def _dropped_record(reason: str, error: str = "") -> dict[str, Any]:
    """Return the record of a row that is not used. `error` is what is wrong with the row; empty if nothing is."""
    return {
        "input_ids": _EMPTY,
        "labels": _EMPTY,
        "length": 0,
        "num_labels": 0,
        "teacher_prompt": _EMPTY,
        "teacher_length": 0,
        "tag": "",
        "shortened": False,
        "dropped": reason,
        "error": error,
    }

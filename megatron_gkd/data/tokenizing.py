"""The function that is mapped over a source in parallel: raw rows in, token ids, labels and verdicts out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

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
from megatron_gkd.data.rows import BadRow, TokenIds, parse_row, tag_of
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.sources import TEXT, decode_json, drop_nulls
from megatron_gkd.data.teacher_view import cut_like, prompt_for_teacher
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.data.truncation import TruncationStrategy, truncate

BLANK = "blank line"
_EMPTY = np.zeros(0, dtype=np.int64)

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "labels": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
        "num_labels": datasets.Value("int32"),  # labels that are not -100
        "teacher_prompt": datasets.List(datasets.Value("int32")),  # empty where the row has none
        "teacher_length": datasets.Value("int32"),  # of the whole sequence behind it; 0 where the row has none
        "tag": datasets.Value("string"),  # empty where no key is configured
        "shortened": datasets.Value("bool"),  # the prompt lost its start, to leave room for a completion
        "dropped": datasets.Value("string"),  # why the row is not used; empty for one that is
        "error": datasets.Value("string"),  # what is wrong with the row; empty unless it is a bad row
    }
)
VERDICT = ("shortened", "dropped", "error")  # of a row, beside what makes its sample


@dataclass
class RowTokenizer:
    """Tokenises batches of rows. It is pickled into the worker processes, where it loads the plugins itself."""

    tokenizer: PreTrainedTokenizerBase
    is_json: bool
    max_length: int
    truncation_strategy: TruncationStrategy
    loss_on: str
    preprocessor: str | None = None
    external_plugins: Sequence[str] = ()
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    prompts: bool = False  # a row may be a prompt alone
    prompt_limits: PromptLimits | None = None  # of rows that the student may answer; None: it answers none
    teacher_max_length: int | None = None  # None: max_length
    tag_key: str | None = None
    vocab_size: int | None = None  # ids that every model of the run can read; None: the tokenizer's

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of `FEATURES` for the columns of a source, one row for each."""
        columns = list(batch)
        rows = [self._row(dict(zip(columns, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in FEATURES}

    def _row(self, raw: dict[str, Any]) -> dict[str, Any]:
        if self.is_json and not raw[TEXT].strip():
            return _record(dropped=BLANK)
        try:
            row = self._preprocess(decode_json(raw[TEXT]) if self.is_json else drop_nulls(raw))
            if row is None:
                return _record(dropped=PREPROCESSOR)
            parsed = parse_row(row, prompts=self.prompts)
            if isinstance(parsed, TokenIds) and parsed.masked:
                return _record(dropped=MASKED)
            tag = tag_of(row, self.tag_key) if self.tag_key else ""
            input_ids, labels = self._render(parsed)
            teacher_prompt = None
            if parsed.teacher_prompt is not None:
                teacher_prompt = prompt_for_teacher((input_ids, labels), self._render(parsed.for_teacher()))
        except BadRow as bad:
            return _record(dropped=bad.reason, error=str(bad))
        surplus = max(0, prompt_length(labels) - self.prompt_limits.student) if self.prompt_limits else 0
        if surplus and self.truncation_strategy == "delete":
            return _record(dropped=NO_ROOM)
        if surplus:
            whole, input_ids, labels = labels, input_ids[surplus:], labels[surplus:]
            if teacher_prompt is not None:
                teacher_prompt = cut_like(teacher_prompt, whole, labels, "left")
        cut = truncate(input_ids, labels, self.max_length, self.truncation_strategy)
        if cut is None:
            return _record(dropped=TOO_LONG)
        if (cut[1] == IGNORED_LABEL).all() and (labels != IGNORED_LABEL).any():
            return _record(dropped=NOTHING_TO_LEARN)
        if teacher_prompt is not None:
            teacher_prompt = cut_like(teacher_prompt, labels, cut[1], self.truncation_strategy)
        if teacher_prompt is not None and self.prompt_limits and len(teacher_prompt) > self.prompt_limits.teacher:
            return _record(dropped=NO_ROOM_FOR_TEACHER)
        record = _record(*cut, teacher_prompt=teacher_prompt, tag=tag, shortened=surplus > 0)
        if record["teacher_length"] > (self.teacher_max_length or self.max_length):
            return _record(dropped=TOO_LONG_FOR_TEACHER)
        return record

    def _preprocess(self, row: Any) -> Any:
        if self._preprocessor is None:
            return row
        try:
            return self._preprocessor(row)
        except Exception as error:  # a user's own code
            message = f"{self.preprocessor!r} raised {type(error).__name__}: {error}"
            raise BadRow("preprocessor failed", message) from error

    @cached_property
    def _preprocessor(self) -> Preprocessor | None:
        load_plugins(self.external_plugins)
        return find_preprocessor(self.preprocessor) if self.preprocessor else None

    @cached_property
    def _render(self) -> RowRenderer:
        return RowRenderer(self.tokenizer, self.loss_on, self.template_kwargs, self.vocab_size)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is cached: a plugin's function cannot be pickled, and a worker makes its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_preprocessor", "_render")}


def _record(
    input_ids: np.ndarray = _EMPTY,
    labels: np.ndarray = _EMPTY,
    dropped: str = "",
    error: str = "",
    teacher_prompt: np.ndarray | None = None,
    tag: str = "",
    shortened: bool = False,
) -> dict[str, Any]:
    response = len(input_ids) - prompt_length(labels)
    return {
        "input_ids": input_ids,
        "labels": labels,
        "length": len(input_ids),
        "num_labels": int((labels != IGNORED_LABEL).sum()),
        "teacher_prompt": _EMPTY if teacher_prompt is None else teacher_prompt,
        "teacher_length": 0 if teacher_prompt is None else len(teacher_prompt) + response,
        "tag": tag,
        "shortened": shortened,
        "dropped": dropped,
        "error": error,
    }

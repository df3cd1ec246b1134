"""Tokenization of raw rows to token ids and labels, with a reason for each row that is dropped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.columns import EMPTY, FEATURES, IMAGE_FEATURES, dropped_record
from megatron_gkd.data.plugins import Preprocessor, find_preprocessor, load_plugins
from megatron_gkd.data.prompt import PromptLimits, prompt_length
from megatron_gkd.data.report import (
    IMAGE_CUT,
    MASKED,
    NO_ROOM,
    NO_ROOM_FOR_TEACHER,
    NOTHING_TO_LEARN,
    PREPROCESSOR,
    TOO_LONG,
    TOO_LONG_FOR_TEACHER,
)
from megatron_gkd.data.row_forms import PlainText, Row, TokenIds
from megatron_gkd.data.rows import parse_row, read_tag
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.sources import TEXT, decode_json, drop_nulls
from megatron_gkd.data.teacher_view import extract_teacher_prompt, truncate_teacher_prompt
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.data.truncation import truncate
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image, Video, to_record
from megatron_gkd.data.vision.parts import Reference
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.video_files import VideoReference, resolve_video

BLANK = "blank line"


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
        images: what the student's processor makes of images; None where it reads text alone.
    """

    allows_prompts: bool = False
    prompt_limits: PromptLimits | None = None
    tag_key: str | None = None
    vocab_size: int | None = None
    images: ImageProcessing | None = None


class _DroppedRow(Exception):
    """A row that is not used, without being wrong in itself. `reason` is what such rows are counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class _Tokens:
    """A row's token ids and shifted labels, both int64 [L], and the token ids of the teacher's own prompt.

    The images are those whose tokens are in the ids, and in the teacher's prompt.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    teacher_prompt: np.ndarray | None = None
    images: tuple[Image, ...] = ()
    teacher_images: tuple[Image, ...] = ()

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
        teacher_images = () if teacher_prompt is None else self.teacher_images
        return replace(
            self, input_ids=input_ids, labels=labels, teacher_prompt=teacher_prompt, teacher_images=teacher_images
        )


@dataclass
class RowTokenizer:
    """Tokenize batches of rows. It is pickled into the worker processes, where it loads the plugins itself."""

    tokenizer: PreTrainedTokenizerBase
    is_json: bool
    section: DataSection
    options: RowOptions
    store: ImageStore | None = None

    @property
    def features(self) -> datasets.Features:
        """The columns that rows are turned into."""
        return FEATURES if self.options.images is None else datasets.Features(FEATURES | IMAGE_FEATURES)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of `features` for the columns of a source, one row for each."""
        columns = list(batch)
        rows = [self._record(dict(zip(columns, values, strict=True))) for values in zip(*batch.values(), strict=True)]
        return {name: [row[name] for row in rows] for name in self.features}

    def _record(self, raw: dict[str, Any]) -> dict[str, Any]:
        if self.is_json and not raw[TEXT].strip():
            return dropped_record(BLANK)
        try:
            row, tag = self._parse(raw)
            whole = self._tokenize(row)
            shortened = self._shorten_prompt(whole)
            tokens = self._truncate(shortened)
        except BadRow as bad:
            return dropped_record(bad.reason, str(bad))
        except _DroppedRow as dropped:
            return dropped_record(dropped.reason)
        return {
            "input_ids": tokens.input_ids,
            "labels": tokens.labels,
            "length": len(tokens.input_ids),
            "num_labels": int((tokens.labels != IGNORED_LABEL).sum()),
            "teacher_prompt": EMPTY if tokens.teacher_prompt is None else tokens.teacher_prompt,
            "teacher_length": tokens.teacher_length,
            "tag": tag,
            "shortened": shortened is not whole,
            "dropped": "",
            "error": "",
            "images": [to_record(image) for image in tokens.images],
            "teacher_images": [to_record(image) for image in tokens.teacher_images],
            "num_patches": self._count_patches(tokens),
            "num_videos": sum(isinstance(image, Video) for image in (*tokens.images, *tokens.teacher_images)),
        }

    def _count_patches(self, tokens: _Tokens) -> int:
        images = self.options.images
        if images is None:
            return 0
        return max(sum(map(images.num_patches, some)) for some in (tokens.images, tokens.teacher_images))

    def _parse(self, raw: dict[str, Any]) -> tuple[Row, str]:
        """Return the row in one of its checked forms, and its tag."""
        row = self._preprocess(decode_json(raw[TEXT]) if self.is_json else drop_nulls(raw))
        if row is None:
            raise _DroppedRow(PREPROCESSOR)
        images = self.options.images
        parsed = parse_row(
            row,
            allows_prompts=self.options.allows_prompts,
            reads_images=images is not None,
            reads_videos=images is not None and images.videos is not None,
        )
        if isinstance(parsed, TokenIds) and parsed.masked:
            raise _DroppedRow(MASKED)
        return parsed, read_tag(row, self.options.tag_key) if self.options.tag_key else ""

    def _tokenize(self, row: Row) -> _Tokens:
        images = self._find_images(row)
        input_ids, labels = self._render(row, images)
        if row.teacher_prompt is None:
            return _Tokens(input_ids, labels, images=images)
        for_teacher = row.for_teacher()
        teacher_images = self._find_images(for_teacher)
        prompt = extract_teacher_prompt((input_ids, labels), self._render(for_teacher, teacher_images))
        return _Tokens(input_ids, labels, prompt, images, teacher_images)

    def _find_images(self, row: Row) -> tuple[Image, ...]:
        if isinstance(row, PlainText) or not row.images:
            return ()
        return tuple(map(self._find_image, row.images))

    def _find_image(self, reference: Reference) -> Image:
        if self.store is None:
            raise ValueError("there is no store to find images in")
        if not isinstance(reference, VideoReference):
            return self.store.resolve(reference)
        if self.options.images is None or self.options.images.videos is None:
            raise ValueError("the student reads no videos")
        return resolve_video(self.store, reference, self.options.images.videos.sample)

    def _shorten_prompt(self, tokens: _Tokens) -> _Tokens:
        """Return the row with a prompt that leaves room for a completion; the same object if it does already."""
        limits = self.options.prompt_limits
        surplus = 0 if limits is None else prompt_length(tokens.labels) - limits.student
        if surplus <= 0:
            return tokens
        if self.section.truncation_strategy == "delete":
            raise _DroppedRow(NO_ROOM)
        shortened = tokens.truncate(tokens.input_ids[surplus:], tokens.labels[surplus:], "left")
        self._require_whole_images(tokens, shortened)
        return shortened

    def _truncate(self, tokens: _Tokens) -> _Tokens:
        """Return the row within the limits of the student's and the teacher's sequences."""
        section, limits = self.section, self.options.prompt_limits
        kept = truncate(tokens.input_ids, tokens.labels, section.max_length, section.truncation_strategy)
        if kept is None:
            raise _DroppedRow(TOO_LONG)
        input_ids, labels = kept
        if (labels == IGNORED_LABEL).all() and (tokens.labels != IGNORED_LABEL).any():
            raise _DroppedRow(NOTHING_TO_LEARN)
        whole, tokens = tokens, tokens.truncate(input_ids, labels, section.truncation_strategy)
        self._require_whole_images(whole, tokens)
        if tokens.teacher_prompt is not None and limits is not None and len(tokens.teacher_prompt) > limits.teacher:
            raise _DroppedRow(NO_ROOM_FOR_TEACHER)
        if tokens.teacher_length > (section.teacher_max_length or section.max_length):
            raise _DroppedRow(TOO_LONG_FOR_TEACHER)
        return tokens

    def _require_whole_images(self, before: _Tokens, after: _Tokens) -> None:
        """Check that a truncated row has all tokens of its images, and has them in its prompt."""
        reserved = () if self.options.images is None else self.options.images.reserved_ids
        prompt = after.input_ids[: prompt_length(after.labels)]
        pairs = [(before.input_ids, prompt)] if before.images else []
        if before.teacher_images and after.teacher_prompt is not None and before.teacher_prompt is not None:
            pairs.append((before.teacher_prompt, after.teacher_prompt))
        for whole, part in pairs:
            if np.isin(whole, reserved).sum() != np.isin(part, reserved).sum():
                raise _DroppedRow(IMAGE_CUT)

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
        return RowRenderer(
            self.tokenizer,
            section.loss_on,
            section.chat_template_kwargs,
            self.options.vocab_size,
            self.options.images,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without what is cached: a plugin's function cannot be pickled; a worker loads its own."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_preprocessor", "_render")}

"""Tokenization of raw rows to token ids and labels, with a reason for each row that is dropped."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import DataSection
from megatron_gkd.config.system_text import read_system
from megatron_gkd.data.bad_row import BadRow, DroppedRow
from megatron_gkd.data.columns import EMPTY, FEATURES, IMAGE_FEATURES, NO_WEIGHTS, dropped_record
from megatron_gkd.data.end_of_turn import find_end_of_turn
from megatron_gkd.data.entries import EntryOptions
from megatron_gkd.data.forms.recognition import Conventions, WrittenRow, recognize, require_object
from megatron_gkd.data.forms.template_words import find_template_words
from megatron_gkd.data.json_text import decode_json
from megatron_gkd.data.loss_weights import LossStrategy, apply_weights
from megatron_gkd.data.plugins import Preprocessor, load_plugins
from megatron_gkd.data.prompt import PromptLimits, prompt_length
from megatron_gkd.data.prompt_frame import FrameFinder
from megatron_gkd.data.report import (
    MASKED,
    NO_RESPONSE,
    PREPROCESSOR,
    WEIGHTLESS,
)
from megatron_gkd.data.row_forms import Conversation, PlainText, Row, TokenIds, as_plain_text
from megatron_gkd.data.row_limits import RowLimiter
from megatron_gkd.data.row_tokens import RowTokens
from megatron_gkd.data.rows import read_row, read_tag
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.sources import TEXT, drop_nulls
from megatron_gkd.data.special_texts import SpecialTexts
from megatron_gkd.data.teacher_view import extract_teacher_prompt
from megatron_gkd.data.template import RowRenderer
from megatron_gkd.data.vision.files import ImageStore
from megatron_gkd.data.vision.image import Image, Video, to_record
from megatron_gkd.data.vision.parts import Media, Reference
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.video_files import VideoReference, resolve_video

BLANK = "blank line"
_CACHED = ("_preprocessor", "_render", "_limiter", "_end_of_turn", "_special_texts")


@dataclass(frozen=True)
class RowOptions:
    """What a run requires of its rows, beside the recipe's `data` section.

    Attributes:
        allows_prompts: a row may be a prompt alone, which the student responds to.
        skips_prompts: a row that is a prompt alone is left out, in place of an error.
        has_unused_responses: the student responds to every row, so that a response that is too long is cut off.
        prompt_limits: longer prompts are shortened, or their rows dropped, by `truncation_strategy`; None where the
            student responds to no row.
        tag_key: the rows' key whose value is `Sample.tag`, which every row must have; None for no tags.
        vocab_size: number of ids that every model of the run can read: a row with another one is bad; None: the number
            of the tokenizer's tokens.
        seed: of the run, by which rows are drawn for `#n` and `split_dataset_ratio`.
        use_hf: ids of data sets are those of Hugging Face's hub, not of ModelScope.
        images: what the student's processor makes of images; None where it reads text alone.
    """

    allows_prompts: bool = False
    skips_prompts: bool = False
    has_unused_responses: bool = False
    prompt_limits: PromptLimits | None = None
    tag_key: str | None = None
    vocab_size: int | None = None
    seed: int = 0
    use_hf: bool = True
    images: ImageProcessing | None = None


@dataclass
class RowTokenizer:
    """Tokenize batches of rows. It is pickled into the worker processes, where it loads the plugins itself."""

    tokenizer: PreTrainedTokenizerBase
    is_json: bool
    section: DataSection
    options: RowOptions
    store: ImageStore | None = None
    entry: EntryOptions = field(default_factory=EntryOptions)

    @property
    def features(self) -> datasets.Features:
        """The columns that rows are turned into."""
        return FEATURES if self.options.images is None else datasets.Features(FEATURES | IMAGE_FEATURES)

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Return the columns of `features` for the columns of a source, one row for each."""
        columns = list(batch)
        rows = [
            record | {"batch_row": index}
            for index, values in enumerate(zip(*batch.values(), strict=True))
            for record in self._records(dict(zip(columns, values, strict=True)))
        ]
        return {name: [row[name] for row in rows] for name in self.features}

    def _records(self, raw: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the record of a row; several of one that is split."""
        if self.is_json and not raw[TEXT].strip():
            return [dropped_record(BLANK)]
        try:
            written = self._recognize(raw)
            row, tag = self._parse(written)
            whole = self._tokenize(row)
            pieces = self._limiter.split(row, whole)
            if pieces is not None:
                return [self._record(piece, tag) | {"form": written.form} for piece in pieces]
            shortened = self._limiter.shorten_prompt(row, whole)
            tokens = self._limiter.truncate(row, shortened)
            status = {
                "form": written.form,
                "shortened": shortened is not whole,
                "truncated": len(tokens.input_ids) < len(whole.input_ids),
                "conversation": self._is_conversation(row, tokens),
                "special": self._special_texts.find(row),
            }
            return [self._record(tokens, tag) | status]
        except BadRow as bad:
            return [dropped_record(bad.reason, str(bad))]
        except DroppedRow as dropped:
            return [dropped_record(dropped.reason)]

    def _record(self, tokens: RowTokens, tag: str) -> dict[str, Any]:
        weighted = apply_weights(tokens.input_ids, tokens.labels, tokens.weights)
        return {
            "input_ids": tokens.input_ids,
            "labels": weighted.labels,
            "length": len(tokens.input_ids),
            "num_labels": int((weighted.labels != IGNORED_LABEL).sum()),
            "label_weights": NO_WEIGHTS if weighted.label_weights is None else weighted.label_weights,
            "response_start": -1 if weighted.response_start is None else weighted.response_start,
            "teacher_prompt": EMPTY if tokens.teacher_prompt is None else tokens.teacher_prompt,
            "teacher_length": tokens.teacher_length,
            "tag": tag,
            "form": "",
            "truncated": False,
            "shortened": False,
            "conversation": False,
            "special": "",
            "dropped": "",
            "error": "",
            "images": [to_record(image) for image in tokens.images],
            "teacher_images": [to_record(image) for image in tokens.teacher_images],
            "num_patches": self._count_patches(tokens),
            "num_videos": sum(isinstance(image, Video) for image in (*tokens.images, *tokens.teacher_images)),
        }

    def _is_conversation(self, row: Row, tokens: RowTokens) -> bool:
        """Return whether the row is rendered by the chat template, or its prompt has the end of a turn of it."""
        prompt = tokens.input_ids[: prompt_length(tokens.labels)]
        return isinstance(row, Conversation) or (self._end_of_turn is not None and self._end_of_turn in prompt)

    def _count_patches(self, tokens: RowTokens) -> int:
        images = self.options.images
        if images is None:
            return 0
        return max(sum(map(images.num_patches, some)) for some in (tokens.images, tokens.teacher_images))

    def _recognize(self, raw: dict[str, Any]) -> WrittenRow:
        """Return the row that the preprocessor makes, with the form that it has."""
        row = require_object(decode_json(raw[TEXT]) if self.is_json else drop_nulls(raw))
        row = self._preprocess(self.entry.rename(row) if self.entry.columns else row)
        if row is None:
            raise DroppedRow(PREPROCESSOR)
        return recognize(row, self._conventions)

    def _parse(self, written: WrittenRow) -> tuple[Row, str]:
        """Return the row in one of its checked forms, and its tag."""
        images = self.options.images
        media = Media(images is not None, images is not None and images.videos is not None)
        allows_prompts = self.options.allows_prompts or self.options.skips_prompts
        parsed = read_row(written, allows_prompts=allows_prompts, media=media)
        if isinstance(parsed, TokenIds) and parsed.masked:
            raise DroppedRow(MASKED)
        if self._strategy.has_prompts:
            parsed = as_plain_text(parsed)
        if self.options.skips_prompts and not parsed.has_response:
            raise DroppedRow(NO_RESPONSE)
        return parsed, self._tag(written.row)

    def _tag(self, row: dict[str, Any]) -> str:
        if self.entry.tag is not None:
            return self.entry.tag
        return read_tag(row, self.options.tag_key) if self.options.tag_key else ""

    def _tokenize(self, row: Row) -> RowTokens:
        images = self._find_images(row)
        rendered = self._render(row, images)
        tokens = RowTokens(*rendered, images=images)
        has_response = (rendered.labels != IGNORED_LABEL).any()
        if row.has_response and not has_response and isinstance(row, Conversation):
            raise BadRow("no response", "the chat template writes nothing of the assistant turns that are trained on")
        if has_response and not tokens.has_labels and (self.options.skips_prompts or not self.options.allows_prompts):
            raise DroppedRow(WEIGHTLESS)
        if row.teacher_prompt is None:
            return tokens
        if self._strategy.has_prompts:
            raise BadRow("teacher_prompt", "loss_scale: all trains on prompts, which the teacher must then read, too")
        for_teacher = row.for_teacher()
        teacher_images = self._find_images(for_teacher)
        of_teacher = self._render(for_teacher, teacher_images)
        prompt = extract_teacher_prompt(
            (rendered.input_ids, rendered.labels), (of_teacher.input_ids, of_teacher.labels)
        )
        return replace(tokens, teacher_prompt=prompt, teacher_images=teacher_images)

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

    def _preprocess(self, row: Any) -> Any:
        if self._preprocessor is None:
            return row
        try:
            return self._preprocessor(row)
        except Exception as error:  # a user's own code
            name = self.entry.preprocessor or self.entry.dataset
            message = f"{name!r} raised {type(error).__name__}: {error}"
            raise BadRow("preprocessor failed", message) from error

    @cached_property
    def _preprocessor(self) -> Preprocessor | None:
        load_plugins(self.section.external_plugins)
        return self.entry.find_preprocessor()

    @property
    def _strategy(self) -> LossStrategy:
        return LossStrategy.from_name(self.section.loss_scale)

    @cached_property
    def _end_of_turn(self) -> int | None:
        return find_end_of_turn(self.tokenizer, self.section.chat_template_kwargs)

    @cached_property
    def _special_texts(self) -> SpecialTexts:
        return SpecialTexts.from_tokenizer(self.tokenizer)

    @cached_property
    def _conventions(self) -> Conventions:
        return Conventions(read_system(self.section.system), find_template_words(self.tokenizer.chat_template))

    @cached_property
    def _render(self) -> RowRenderer:
        section = self.section
        return RowRenderer(
            self.tokenizer,
            self._strategy,
            section.chat_template_kwargs,
            self.options.vocab_size,
            self.options.images,
        )

    @cached_property
    def _limiter(self) -> RowLimiter:
        options = self.options
        return RowLimiter(
            self.section,
            FrameFinder(self._render),
            options.prompt_limits,
            options.has_unused_responses,
            () if options.images is None else options.images.reserved_ids,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without what is cached: a plugin's function cannot be pickled; a worker loads its own."""
        return {name: value for name, value in self.__dict__.items() if name not in _CACHED}

"""The lengths that a row's sequences may have, and what becomes of longer ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_gkd.config.schema import DataSection
from megatron_gkd.data.bad_row import BadRow, DroppedRow
from megatron_gkd.data.prompt import PromptLimits, prompt_length
from megatron_gkd.data.prompt_frame import Frame, FrameFinder
from megatron_gkd.data.report import (
    IMAGE_CUT,
    NO_ROOM,
    NO_ROOM_FOR_TEACHER,
    NOTHING_TO_LEARN,
    TOO_LONG,
    TOO_LONG_FOR_TEACHER,
)
from megatron_gkd.data.row_forms import PlainText, Row
from megatron_gkd.data.row_tokens import RowTokens
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.truncation import remove_tokens, truncate


@dataclass(frozen=True)
class RowLimiter:
    """Shorten, split or drop rows that are too long.

    Attributes:
        section: the recipe's data section.
        frames: finds what a shortened prompt keeps.
        prompt_limits: see `RowOptions`.
        has_unused_responses: see `RowOptions`.
        reserved_ids: tokens of images.
    """

    section: DataSection
    frames: FrameFinder
    prompt_limits: PromptLimits | None
    has_unused_responses: bool
    reserved_ids: tuple[int, ...]

    def split(self, row: Row, tokens: RowTokens) -> list[RowTokens] | None:
        """Return the pieces of a row that is split; None for other rows."""
        section = self.section
        if section.truncation_strategy != "split" or len(tokens.input_ids) <= section.max_length:
            return None
        if not isinstance(row, PlainText) or row.teacher_prompt is not None:
            raise BadRow(
                "cannot be split",
                f"it has {len(tokens.input_ids)} tokens, above max_length = {section.max_length}; of such rows "
                "truncation_strategy: split takes plain text without a teacher_prompt alone",
            )
        return tokens.split(section.max_length)

    def shorten_prompt(self, row: Row, tokens: RowTokens) -> RowTokens:
        """Return the row with a prompt that leaves room for a completion; the same object if it does already."""
        limits = self.prompt_limits
        surplus = 0 if limits is None else prompt_length(tokens.labels) - limits.student
        if limits is None or surplus <= 0:
            return tokens
        if self.section.truncation_strategy not in ("left", "right"):
            raise DroppedRow(NO_ROOM)
        frame = self._find_frame(row, tokens)
        if frame.header + frame.footer >= limits.student:  # nothing of what the user says would be left
            raise DroppedRow(NO_ROOM)
        kept = remove_tokens(tokens.places, tokens.labels, frame.header, surplus)
        shortened = tokens.truncate(*kept, "left", frame.header)
        self._require_whole_images(tokens, shortened)
        return shortened

    def truncate(self, row: Row, tokens: RowTokens) -> RowTokens:
        """Return the row within the limits of the student's and the teacher's sequences."""
        if self.has_unused_responses:
            return self._truncate_response(tokens)
        section, strategy = self.section, self.section.truncation_strategy
        is_long = len(tokens.input_ids) > section.max_length
        frame = self._find_frame(row, tokens) if is_long and strategy == "left" else Frame()
        kept = truncate(tokens.places, tokens.labels, section.max_length, strategy, frame)
        if kept is None:
            raise DroppedRow(TOO_LONG)
        places, labels = kept
        whole, tokens = tokens, tokens.truncate(places, labels, strategy, frame.header)
        if whole.has_labels and not tokens.has_labels:
            raise DroppedRow(NOTHING_TO_LEARN)
        self._require_whole_images(whole, tokens)
        self._require_room_for_teacher(tokens)
        if tokens.teacher_length > (section.teacher_max_length or section.max_length):
            raise DroppedRow(TOO_LONG_FOR_TEACHER)
        return tokens

    def _find_frame(self, row: Row, tokens: RowTokens) -> Frame:
        return self.frames.find(row, tokens.input_ids[: prompt_length(tokens.labels)], tokens.images)

    def _truncate_response(self, tokens: RowTokens) -> RowTokens:
        """Return the row without the end of a response for which there is no room: no step trains on it."""
        self._require_room_for_teacher(tokens)
        section, length = self.section, len(tokens.input_ids)
        excess = max(
            length - section.max_length, tokens.teacher_length - (section.teacher_max_length or section.max_length)
        )
        if excess <= 0 or (tokens.labels == IGNORED_LABEL).all():
            return tokens
        kept = truncate(tokens.places, tokens.labels, length - excess, "right")
        assert kept is not None
        return tokens.truncate(*kept, "right")

    def _require_room_for_teacher(self, tokens: RowTokens) -> None:
        limits = self.prompt_limits
        if tokens.teacher_prompt is not None and limits is not None and len(tokens.teacher_prompt) > limits.teacher:
            raise DroppedRow(NO_ROOM_FOR_TEACHER)

    def _require_whole_images(self, before: RowTokens, after: RowTokens) -> None:
        """Check that a truncated row has all tokens of its images, and has them in its prompt."""
        prompt = after.input_ids[: prompt_length(after.labels)]
        pairs = [(before.input_ids, prompt)] if before.images else []
        if before.teacher_images and after.teacher_prompt is not None and before.teacher_prompt is not None:
            pairs.append((before.teacher_prompt, after.teacher_prompt))
        for whole, part in pairs:
            if np.isin(whole, self.reserved_ids).sum() != np.isin(part, self.reserved_ids).sum():
                raise DroppedRow(IMAGE_CUT)

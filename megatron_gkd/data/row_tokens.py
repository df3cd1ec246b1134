"""A row as tokens, before it is a sample: what it loses by truncation, and the pieces that it is split into."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_gkd.data.loss_weights import apply_weights
from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.data.teacher_view import truncate_teacher_prompt
from megatron_gkd.data.vision.image import Image


@dataclass(frozen=True)
class RowTokens:
    """The tokens of one row.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L], shifted labels of its turns; see `RenderedRow`.
        weights: float32 [L] or None, which decide the labels of the sample; see `RenderedRow`.
        teacher_prompt: token ids of the teacher's own prompt.
        images: those whose tokens are in `input_ids`.
        teacher_images: those whose tokens are in `teacher_prompt`.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None
    teacher_prompt: np.ndarray | None = None
    images: tuple[Image, ...] = ()
    teacher_images: tuple[Image, ...] = ()

    @property
    def teacher_length(self) -> int:
        """Tokens that the teacher reads; 0 where it reads the same as the student."""
        response_length = len(self.input_ids) - prompt_length(self.labels)
        return 0 if self.teacher_prompt is None else len(self.teacher_prompt) + response_length

    @property
    def places(self) -> np.ndarray:
        """The position of each token: int64 [L]."""
        return np.arange(len(self.input_ids))

    def truncate(self, places: np.ndarray, labels: np.ndarray, strategy: str, header: int = 0) -> RowTokens:
        """Return the row with the tokens at `places` (rising), these labels, and a teacher's prompt that matches.

        Of the header, so many tokens, nothing is removed.
        """
        teacher_prompt, weights = self.teacher_prompt, self.weights
        if weights is not None:
            weights = weights[places]
            weights[:-1][np.diff(places) > 1] = 0  # another token follows now
        if teacher_prompt is not None:
            teacher_prompt = truncate_teacher_prompt(
                teacher_prompt, (self.input_ids, self.labels), labels, strategy, header
            )
        return replace(
            self,
            input_ids=self.input_ids[places],
            labels=labels,
            weights=weights,
            teacher_prompt=teacher_prompt,
            teacher_images=() if teacher_prompt is None else self.teacher_images,
        )

    def split(self, max_length: int) -> list[RowTokens]:
        """Return the row as pieces of at most `max_length` tokens, in order, without pieces that have no label.

        A piece begins with the last token of the one before, so that each label of the row is in one piece.
        """
        pieces = []
        for start in range(0, max(1, len(self.input_ids) - 1), max_length - 1):
            places = np.arange(start, min(start + max_length, len(self.input_ids)))
            labels = self.labels[places]
            labels[-1] = IGNORED_LABEL  # the next piece has it
            pieces.append(self.truncate(places, labels, "split"))
        return [piece for piece in pieces if piece.has_labels]

    @property
    def has_labels(self) -> bool:
        """Whether any token is trained on."""
        return bool((apply_weights(self.input_ids, self.labels, self.weights).labels != IGNORED_LABEL).any())

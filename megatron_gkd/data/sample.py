"""One tokenized row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_gkd.data.vision.image import Image

IGNORED_LABEL = -100  # the label of a position that is not trained on
PAD_TOKEN_ID = 0  # the id of padding where the tokenizer has none; what padding holds has no effect on any result
FROM_DATASET = "dataset"
FROM_STUDENT = "student"


@dataclass(frozen=True)
class Sample:
    """Tokens of one sequence and the token that each position must predict.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L], already shifted: `labels[t]` is `input_ids[t + 1]`, or -100 where position t is not trained
            on (prompt, last token).
        source: origin of the response: "dataset", or "student" for one that the student sampled.
        row_id: index of the row in its dataset.
        teacher_prompt: int64 [P], what the teacher reads in place of the prompt (all before the last response); None
            where it reads the same.
        tag: which teacher scores the row, where there are several.
        images: the images whose tokens are in `input_ids`, in order.
        teacher_images: those whose tokens are in `teacher_prompt`; None where the teacher reads the same.
        label_weights: float32 [L], above 0 where there is a label: the factor of its loss; None where all are 1.
        response_start: index of the last response's first token; None where the last run of labels starts with it.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: str
    row_id: int
    teacher_prompt: np.ndarray | None = None
    tag: str | None = None
    images: tuple[Image, ...] = ()
    teacher_images: tuple[Image, ...] | None = None
    label_weights: np.ndarray | None = None
    response_start: int | None = None

    @property
    def label_positions(self) -> np.ndarray:
        """Positions that are trained on: int64 [N], rising."""
        return np.flatnonzero(self.labels != IGNORED_LABEL)

    @property
    def num_labels(self) -> int:
        """Number of positions that are trained on."""
        return len(self.label_positions)


def shift_labels(input_ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Return labels [L] that make position t predict token t + 1 wherever that token is `trained` (bool [L])."""
    labels = np.full_like(input_ids, IGNORED_LABEL)
    labels[:-1] = np.where(trained[1:], input_ids[1:], IGNORED_LABEL)
    return labels

"""One tokenised row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORE = -100  # the label of a position that is not trained on
FROM_DATASET = "dataset"
FROM_STUDENT = "student"


@dataclass(frozen=True)
class Sample:
    """Tokens of one sequence and what each position must predict.

    Attributes:
        input_ids: int64 [L].
        labels: int64 [L], already shifted: `labels[t]` is `input_ids[t + 1]`, or -100 where position t is not trained
            on (prompt, last token).
        source: who wrote the response: "dataset", or "student" for a row that the student generated.
        row_id: index of the row in its dataset.
        teacher_prompt: int64 [P], what the teacher reads in place of the prompt (all before the last response); None
            where it reads the same.
        tag: which teacher judges the row, where there are several.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    source: str
    row_id: int
    teacher_prompt: np.ndarray | None = None
    tag: str | None = None


def shift_labels(input_ids: np.ndarray, trained: np.ndarray) -> np.ndarray:
    """Labels [L] that make position t predict token t + 1 wherever that token is `trained` (bool [L])."""
    labels = np.full_like(input_ids, IGNORE)
    labels[:-1] = np.where(trained[1:], input_ids[1:], IGNORE)
    return labels

"""The part of a sample that a student answers, and the sample that its answer makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_gkd.data.sample import FROM_STUDENT, IGNORE, Sample, shift_labels


def prompt_of(sample: Sample) -> np.ndarray:
    """int64 [P]: the tokens before the last stretch that is trained on; all of them where none is."""
    return sample.input_ids[: prompt_length(sample.labels)]


def prompt_length(labels: np.ndarray) -> int:
    """P of `prompt_of`, from shifted labels [L]; L where none is trained on."""
    trained = np.flatnonzero(labels != IGNORE) + 1  # positions of the tokens themselves
    if len(trained) == 0:
        return len(labels)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[gaps[-1] + 1] if len(gaps) else trained[0])


def answered(row: Sample, answer: Sequence[int], *, trained: bool = True) -> Sample:
    """The row's prompt with the student's answer; without labels where it is not `trained` on."""
    prompt = prompt_of(row)
    input_ids = np.concatenate([prompt, np.asarray(answer, dtype=np.int64)])
    is_answer = np.arange(len(input_ids)) >= len(prompt)
    labels = shift_labels(input_ids, is_answer & trained)
    return replace(row, input_ids=input_ids, labels=labels, source=FROM_STUDENT)

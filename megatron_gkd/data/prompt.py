"""The prompt of a sample, and the sample that the student's response to it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_gkd.data.sample import FROM_STUDENT, IGNORED_LABEL, Sample, shift_labels
from megatron_gkd.errors import UserError


def extract_prompt(sample: Sample) -> np.ndarray:
    """Return the tokens before the last span that is trained on, int64 [P]; all tokens where none is."""
    return sample.input_ids[: prompt_length(sample.labels)]


def prompt_length(labels: np.ndarray) -> int:
    """Return the length of the prompt, P of `extract_prompt`, from shifted labels [L]; L where none is trained on."""
    trained = np.flatnonzero(labels != IGNORED_LABEL) + 1  # positions of the tokens themselves
    if len(trained) == 0:
        return len(labels)
    gaps = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[gaps[-1] + 1] if len(gaps) else trained[0])


@dataclass(frozen=True)
class PromptLimits:
    """The longest prompts, in tokens, that leave room for a completion.

    Attributes:
        student: of a row's own prompt.
        teacher: of its `teacher_prompt`.
    """

    student: int
    teacher: int

    @classmethod
    def from_lengths(cls, max_length: int, teacher_max_length: int, max_completion_length: int) -> PromptLimits:
        """Reserve `max_completion_length` tokens of each sequence, but at most a quarter of it and at least one."""
        lengths = (max_length, teacher_max_length)
        return cls(*(length - max(1, min(max_completion_length, length // 4)) for length in lengths))


def max_response_length(sample: Sample, max_length: int, teacher_max_length: int) -> int:
    """Return how many tokens of a response the student's and the teacher's sequences have room for.

    Raises:
        UserError: there is no room.
    """
    limits = [("prompt", extract_prompt(sample), "data.max_length", max_length)]
    if sample.teacher_prompt is not None:
        limits += [("teacher_prompt", sample.teacher_prompt, "data.teacher_max_length", teacher_max_length)]
    for name, tokens, key, limit in limits:
        if len(tokens) >= limit:
            raise UserError(
                f"{key} = {limit}: the {name} of row {sample.row_id} of the dataset has {len(tokens)} tokens, which "
                f"leaves no room for a completion; increase {key}"
            )
    return min(limit - len(tokens) for _, tokens, _, limit in limits)


def replace_response(row: Sample, response: Sequence[int], *, trained: bool = True) -> Sample:
    """Return the row's prompt with the student's `response`; without labels where it is not `trained` on."""
    prompt = extract_prompt(row)
    input_ids = np.concatenate([prompt, np.asarray(response, dtype=np.int64)])
    is_response = np.arange(len(input_ids)) >= len(prompt)
    labels = shift_labels(input_ids, is_response & trained)
    return replace(row, input_ids=input_ids, labels=labels, source=FROM_STUDENT)

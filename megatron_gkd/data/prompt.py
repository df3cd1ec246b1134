"""The prompt of a sample, and the sample that the student's response to it makes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.sample import FROM_STUDENT, IGNORED_LABEL, Sample, shift_labels
from megatron_gkd.errors import UserError


def extract_prompt(sample: Sample) -> np.ndarray:
    """Return the tokens before the last response, int64 [P]; all tokens where there is none."""
    return sample.input_ids[: start_of_response(sample)]


def start_of_response(sample: Sample) -> int:
    """Return the index of the last response's first token; the number of tokens where there is none."""
    return prompt_length(sample.labels) if sample.response_start is None else sample.response_start


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
    def from_recipe(cls, recipe: Recipe) -> PromptLimits:
        """Return the limits of a recipe's sequences: they leave room for `max_completion_length` tokens."""
        return cls(recipe.max_prompt_length, recipe.teacher_sequence_length - recipe.max_completion_length)


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
    """Return the row's prompt with the student's `response`; without labels where it is not `trained` on.

    All tokens of the response have the weight 1, and those of the prompt no label, whatever `data.loss_scale` is.
    """
    prompt = extract_prompt(row)
    input_ids = np.concatenate([prompt, np.asarray(response, dtype=np.int64)])
    is_response = np.arange(len(input_ids)) >= len(prompt)
    labels = shift_labels(input_ids, is_response & trained)
    return replace(
        row, input_ids=input_ids, labels=labels, source=FROM_STUDENT, label_weights=None, response_start=None
    )

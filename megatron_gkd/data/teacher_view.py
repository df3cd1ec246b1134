"""The sequence that the teacher reads: a prompt of its own, where the row has one, and the same response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.sample import IGNORED_LABEL, Sample

TokensAndLabels = tuple[np.ndarray, np.ndarray]  # ids and shifted labels, both int64 [L]


def teacher_view(sample: Sample) -> Sample:
    """Return the teacher's sequence with the same labels in the same order; `sample` itself where it reads the same.

    The response follows `teacher_prompt`, whose images are `teacher_images`, or the row's where that is None. Labels
    of earlier turns keep their positions: both prompts begin with those turns (``extract_teacher_prompt``).
    """
    if sample.teacher_prompt is None or not sample.num_labels:
        return sample
    start = prompt_length(sample.labels)
    before = np.full(len(sample.teacher_prompt) - 1, IGNORED_LABEL, dtype=np.int64)
    earlier = np.flatnonzero(sample.labels[: start - 1] != IGNORED_LABEL)
    before[earlier] = sample.labels[earlier]
    return replace(
        sample,
        input_ids=np.concatenate([sample.teacher_prompt, sample.input_ids[start:]]),
        labels=np.concatenate([before, sample.labels[start - 1 :]]),
        teacher_prompt=None,
        images=sample.images if sample.teacher_images is None else sample.teacher_images,
        teacher_images=None,
    )


def extract_teacher_prompt(student: TokensAndLabels, teacher: TokensAndLabels) -> np.ndarray:
    """Return `Sample.teacher_prompt` of a row that was rendered twice, once for each of the two models.

    Args:
        student: ids and labels that the student reads.
        teacher: ids and labels that the teacher reads.

    Raises:
        BadRow: "teacher_prompt": the response, or an earlier turn that is trained on, is not the same in both.
    """
    (ids, labels), (teacher_ids, teacher_labels) = student, teacher
    start, teacher_start = prompt_length(labels), prompt_length(teacher_labels)
    if not np.array_equal(ids[start:], teacher_ids[teacher_start:]):
        raise BadRow("teacher_prompt", "the response is tokenized differently after it")
    earlier = np.flatnonzero(labels[: start - 1] != IGNORED_LABEL)
    shared = int(earlier[-1]) + 2 if len(earlier) else 0  # up to the last token that is trained on
    same_tokens = np.array_equal(ids[:shared], teacher_ids[:teacher_start][:shared])
    if not same_tokens or not np.array_equal(
        earlier, np.flatnonzero(teacher_labels[: teacher_start - 1] != IGNORED_LABEL)
    ):
        raise BadRow("teacher_prompt", "with loss_on: all, the last turn alone may follow it")
    return teacher_ids[:teacher_start]


def truncate_teacher_prompt(
    teacher_prompt: np.ndarray, labels: np.ndarray, truncated_labels: np.ndarray, strategy: str
) -> np.ndarray | None:
    """Return the teacher's prompt for a row that ``truncate`` has shortened.

    It stays whole, unless labels of earlier turns are left, which must keep their positions in both prompts.

    Args:
        teacher_prompt: int64 [P].
        labels: the row's shifted labels before truncation.
        truncated_labels: those after it.
        strategy: `data.truncation_strategy`.

    Returns:
        int64 [P'], or None where the last response is gone: the teacher reads the rest of the row like the student.
    """
    start = prompt_length(labels)
    if strategy == "right" and len(truncated_labels) <= start < len(labels):
        return None
    truncated_start = prompt_length(truncated_labels)
    if strategy == "left" and (truncated_labels[: truncated_start - 1] != IGNORED_LABEL).any():
        return teacher_prompt[start - truncated_start :]
    return teacher_prompt

"""The sequence that the teacher reads: a prompt of its own, where the row has one, and the same response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.prompt import prompt_length, start_of_response
from megatron_gkd.data.sample import IGNORED_LABEL, Sample

TokensAndLabels = tuple[np.ndarray, np.ndarray]  # ids and shifted labels, both int64 [L]


def teacher_view(sample: Sample) -> Sample:
    """Return the teacher's sequence with the same labels in the same order; `sample` itself where it reads the same.

    The response follows `teacher_prompt`, whose images are `teacher_images`, or the row's where that is None. Labels
    of earlier turns are in both prompts (``extract_teacher_prompt``). Weights of labels are the student's alone.
    """
    if sample.teacher_prompt is None or not sample.num_labels:
        return sample
    start = start_of_response(sample)
    before = np.full(len(sample.teacher_prompt) - 1, IGNORED_LABEL, dtype=np.int64)
    earlier = np.flatnonzero(sample.labels[: start - 1] != IGNORED_LABEL)
    places = _find_labels(earlier, sample.input_ids[:start], sample.teacher_prompt)
    if places is None:
        raise ValueError(f"row {sample.row_id}: the teacher's prompt lacks a turn that is trained on")
    before[places] = sample.labels[earlier]
    return replace(
        sample,
        input_ids=np.concatenate([sample.teacher_prompt, sample.input_ids[start:]]),
        labels=np.concatenate([before, sample.labels[start - 1 :]]),
        teacher_prompt=None,
        images=sample.images if sample.teacher_images is None else sample.teacher_images,
        teacher_images=None,
        label_weights=None,
        response_start=None,
    )


def _find_labels(earlier: np.ndarray, prompt: np.ndarray, teacher_prompt: np.ndarray) -> np.ndarray | None:
    """Return where the labels at `earlier` in the student's prompt are in the teacher's; None where one is not there.

    They are in what the prompts begin with together, or in what they end with together.
    """
    shift = len(teacher_prompt) - len(prompt)
    begins = earlier + 2 <= _common_length(prompt, teacher_prompt)
    ends = earlier + 1 >= len(prompt) - _common_length(prompt[::-1], teacher_prompt[::-1])
    places = np.where(begins, earlier, earlier + shift)
    is_found = (begins | ends).all() and (places >= 0).all() and (np.diff(places) > 0).all()
    return places if is_found else None


def _common_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences begin with together."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


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
    places = _find_labels(earlier, ids[:start], teacher_ids[:teacher_start])
    found = np.flatnonzero(teacher_labels[: teacher_start - 1] != IGNORED_LABEL)
    if places is None or not np.array_equal(places, found):
        raise BadRow("teacher_prompt", "a turn before the response that is trained on is tokenized differently with it")
    return teacher_ids[:teacher_start]


def truncate_teacher_prompt(
    teacher_prompt: np.ndarray, row: TokensAndLabels, truncated_labels: np.ndarray, strategy: str, header: int = 0
) -> np.ndarray | None:
    """Return the teacher's prompt for a row that ``truncate`` has shortened.

    It stays whole, unless labels of earlier turns are left in what both prompts begin with: then both lose as much.

    Args:
        teacher_prompt: int64 [P].
        row: ids and shifted labels before truncation.
        truncated_labels: the labels after it.
        strategy: `data.truncation_strategy`.
        header: tokens at the start that `left` has kept.

    Returns:
        int64 [P'], or None where the last response is gone: the teacher reads the rest of the row like the student.
    """
    ids, labels = row
    start = prompt_length(labels)
    if strategy == "right" and len(truncated_labels) <= start < len(labels):
        return None
    truncated_start = prompt_length(truncated_labels)
    removed = start - truncated_start
    shared = _common_length(ids[:start], teacher_prompt) - removed  # of what is left
    earlier = np.flatnonzero(truncated_labels[: truncated_start - 1] != IGNORED_LABEL)
    if strategy == "left" and (earlier + 2 <= shared).any():
        return np.delete(teacher_prompt, slice(header, header + removed))
    return teacher_prompt

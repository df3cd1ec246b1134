"""What the teacher reads of a row: a prompt of its own, where the row has one, and the same response."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.rows import BadRow
from megatron_gkd.data.sample import IGNORED_LABEL, Sample
from megatron_gkd.data.truncation import TruncationStrategy

TokensAndLabels = tuple[np.ndarray, np.ndarray]  # ids and shifted labels, both int64 [L]


def teacher_view(sample: Sample) -> Sample:
    """The teacher's sequence with the same labels, one to one and in the same order; `sample` where it reads the same.

    The response comes after `teacher_prompt`. Labels before it, of earlier turns, keep their positions: both prompts
    begin with those turns (``prompt_for_teacher``).
    """
    if sample.teacher_prompt is None or (sample.labels == IGNORED_LABEL).all():
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
    )


def prompt_for_teacher(student: TokensAndLabels, teacher: TokensAndLabels) -> np.ndarray:
    """`Sample.teacher_prompt` of a row that was rendered twice, as each of the two reads it.

    Raises:
        BadRow: "teacher_prompt": the response, or an earlier turn that is trained on, is not the same in both.
    """
    (ids, labels), (teacher_ids, teacher_labels) = student, teacher
    start, teacher_start = prompt_length(labels), prompt_length(teacher_labels)
    if not np.array_equal(ids[start:], teacher_ids[teacher_start:]):
        raise BadRow("teacher_prompt", "the response is made of other tokens behind it")
    earlier = np.flatnonzero(labels[: start - 1] != IGNORED_LABEL)
    shared = int(earlier[-1]) + 2 if len(earlier) else 0  # up to the last token that is trained on
    same_tokens = np.array_equal(ids[:shared], teacher_ids[:teacher_start][:shared])
    if not same_tokens or not np.array_equal(
        earlier, np.flatnonzero(teacher_labels[: teacher_start - 1] != IGNORED_LABEL)
    ):
        raise BadRow("teacher_prompt", "with loss_on: all no other turn may follow it than the last one")
    return teacher_ids[:teacher_start]


def cut_like(
    teacher_prompt: np.ndarray, labels: np.ndarray, cut_labels: np.ndarray, strategy: TruncationStrategy
) -> np.ndarray | None:
    """The teacher's prompt of a row that ``truncate`` has cut; `labels` before and after.

    It stays whole, unless labels of earlier turns are left, which must keep their positions in both prompts. None where
    the last response is gone: what is left of the row, the teacher reads as it stands.
    """
    start = prompt_length(labels)
    if strategy == "right" and len(cut_labels) <= start < len(labels):
        return None
    cut_start = prompt_length(cut_labels)
    if strategy == "left" and (cut_labels[: cut_start - 1] != IGNORED_LABEL).any():
        return teacher_prompt[start - cut_start :]
    return teacher_prompt

"""No teacher is named: the student is its own where rows have a teacher_prompt, and the run ends where none has."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from rows import RandomRows
from training.test_layouts import assert_equal_runs
from training.test_one_process import STUDENT
from training_layouts import RECIPE, train_steps

from megatron_gkd.config.schema import TeacherSection
from megatron_gkd.errors import UserError
from megatron_gkd.training.teacher_rows import check_training_rows


class Rows(SimpleNamespace):
    """As much of a data set as the check reads: the lengths of what the teacher reads in place of the prompt."""

    def __len__(self) -> int:
        return len(self.teacher_lengths)


def rows_of(*teacher_lengths: int) -> Rows:
    return Rows(teacher_lengths=np.array(teacher_lengths))


def test_rows_with_a_teacher_prompt_are_said_in_one_line(caplog):
    with caplog.at_level(logging.INFO, "megatron_gkd"):
        check_training_rows(TeacherSection(), rows_of(0, 7, 9), {})
    (record,) = caplog.records
    assert record.getMessage() == (
        "no teacher is named, and 2 of 3 rows have a teacher_prompt: the student is its own teacher, which reads it "
        "(teacher.teacher_kind = self)"
    )


def test_rows_without_one_end_the_run():
    with pytest.raises(UserError) as error:
        check_training_rows(TeacherSection(), rows_of(0, 0), {})
    assert str(error.value).startswith(
        "teacher.teacher_kind = null: no teacher is named, and no row of data.dataset has a teacher_prompt, with which "
        "the student would be its own; set teacher_model, teacher_model_server or teacher_cache, or teacher_kind = none"
    )


def test_a_moving_average_without_a_name_needs_the_prompts_too():
    with pytest.raises(UserError, match=r"no teacher is named, and no row"):
        check_training_rows(TeacherSection(teacher_ema=0.5), rows_of(0), {})
    check_training_rows(TeacherSection(teacher_ema=0.5, teacher_kind="self"), rows_of(0), {})


def test_training_equals_that_of_the_named_self_teacher(gloo_world):
    def run(kind):
        changes = {"teacher": {"teacher_kind": kind, "teacher_model": None}, "distill": RECIPE["distill"]}
        rows = RandomRows(count=24, privileged=True)
        return gloo_world(1).run(train_steps, STUDENT(), None, changes, rows=rows)[0]

    assert_equal_runs(run(None), run("self"), tolerance=0.0)

"""The student as its own teacher keeps the contract, with any weights, and says what it lacks."""

from __future__ import annotations

import numpy as np
import pytest
from teachers.contract import CHECKPOINT, LAYOUTS, TeacherContract, in_every_rank, mesh_of, score_microbatches

from megatron_gkd.errors import UserError


def results_of(rank, world_size, layout, with_initial_weights):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.teachers.self_teacher import SelfTeacher
    from megatron_gkd.teachers.self_weights import CurrentWeights, InitialWeights

    with mesh_of(layout) as mesh:
        model = MegatronModel.load(Checkpoint.open(str(CHECKPOINT())), mesh, BuildOptions())
        weights = CurrentWeights(model)
        if with_initial_weights:
            weights = InitialWeights(model)
            for chunk in model.chunks:
                for parameter in chunk.parameters():
                    parameter.data.zero_()
        return score_microbatches(SelfTeacher(model, weights, finish_gather=lambda: None), mesh)


class TestCurrentWeights(TeacherContract):
    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def results(cls, request, gloo_world):
        return in_every_rank(gloo_world, request.param, results_of, False)


class TestInitialWeights(TeacherContract):
    @pytest.fixture(scope="class", params=["TP2xPP2"])
    @classmethod
    def results(cls, request, gloo_world):
        return in_every_rank(gloo_world, request.param, results_of, True)


class Rows:
    def __init__(self, *teacher_lengths):
        self.teacher_lengths = np.array(teacher_lengths)


def check_rows_of_several_recipes(rank, world_size):
    from megatron_gkd.config.schema import TeacherSection
    from megatron_gkd.training.teacher_rows import check_training_rows

    dynamic = TeacherSection(teacher_kind="self")
    check_training_rows(dynamic, Rows(0, 7), {})
    for other in (
        {"teacher_kind": "self", "teacher_model": "x"},
        {"teacher_kind": "self", "teacher_ema": 0.9},
        {"teacher_model": "x"},
    ):
        check_training_rows(TeacherSection(**other), Rows(0, 0), {})
    check_training_rows(dynamic, Rows(0, 0), {})


def test_the_current_weights_without_teacher_prompts_are_refused(gloo_world):
    with pytest.raises(
        UserError, match=r"teacher.teacher_kind = self: no row of data.dataset has a teacher_prompt, without"
    ):
        gloo_world(1).run(check_rows_of_several_recipes)

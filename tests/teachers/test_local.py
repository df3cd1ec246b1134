"""The local teacher keeps the contract."""

from __future__ import annotations

import pytest
from teachers.contract import CHECKPOINT, LAYOUTS, TeacherContract, answer, in_every_rank, mesh_of


def answers_of(rank, world_size, layout, offload):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.teachers.local import LocalTeacher

    with mesh_of(layout) as mesh:
        model = MegatronModel.load(Checkpoint.open(str(CHECKPOINT())), mesh, BuildOptions())
        return answer(LocalTeacher(model, head_rows=-(-99 // mesh.tp.size()), offload=offload), mesh)


class TestLocalTeacher(TeacherContract):
    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def answers(cls, request, gloo_world):
        return in_every_rank(gloo_world, request.param, answers_of, False)


class TestOffloadedTeacher(TeacherContract):
    @pytest.fixture(scope="class", params=["TP2xPP2"])
    @classmethod
    def answers(cls, request, gloo_world):
        return in_every_rank(gloo_world, request.param, answers_of, True)

"""The local teacher keeps the contract."""

from __future__ import annotations

import pytest
from teachers.contract import CHECKPOINT, LAYOUTS, TeacherContract, in_every_rank, mesh_of, score_microbatches


def results_of(rank, world_size, layout, offload):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.teachers.local import LocalTeacher

    with mesh_of(layout) as mesh:
        model = MegatronModel.load(Checkpoint.open(str(CHECKPOINT())), mesh, BuildOptions())
        return score_microbatches(LocalTeacher(model, head_rows=-(-99 // mesh.tp.size()), offload=offload), mesh)


class TestLocalTeacher(TeacherContract):
    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def results(cls, request, gloo_world):
        return in_every_rank(gloo_world, request.param, results_of, False)


class TestOffloadedTeacher(TeacherContract):
    @pytest.fixture(scope="class", params=["TP2xPP2"])
    @classmethod
    def results(cls, request, gloo_world):
        return in_every_rank(gloo_world, request.param, results_of, True)

"""The teacher behind servers, over a fake one: the contract, and what it begins ahead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from teachers.contract import CHECKPOINT, LAYOUTS, TeacherContract, answer, in_every_rank, mesh_of
from teachers.fake_server import FakeServer


@pytest.fixture(scope="module")
def fake_server() -> Iterator[FakeServer]:
    with FakeServer(CHECKPOINT()) as server:
        yield server


def teacher_of(mesh, urls, **options):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.teachers.server import ServerOptions, ServerTeacher

    options = ServerOptions(tuple(urls), **{"k": 8, "max_length": 64, "patience": 30.0} | options)
    return ServerTeacher(mesh, Checkpoint.open(str(CHECKPOINT())).tokenizer(), 99, options)


def answers_of(rank, world_size, layout, urls):
    with mesh_of(layout) as mesh:
        return answer(teacher_of(mesh, urls), mesh)


class TestServerTeacher(TeacherContract):
    """By two addresses of the server, as if there were two."""

    @pytest.fixture(scope="class", params=LAYOUTS)
    @classmethod
    def answers(cls, request, gloo_world, fake_server):
        urls = [fake_server.url, fake_server.url.replace("127.0.0.1", "localhost")]
        return in_every_rank(gloo_world, request.param, answers_of, urls)

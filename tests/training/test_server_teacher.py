"""Training by a teacher behind a server: every layout has the loss and the gradient of one process, and that has those
of the local teacher's top-k."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from layouts import DENSE
from teachers.fake_server import FakeServer
from training.test_layouts import assert_equal_runs, models
from training_layouts import train_steps

LAYOUTS = ["TP2+SP, packed", "PP2", "CP2", "CP2xDP2, packed", "TP2xCP2"]
TAILS = {
    "renormalize": {"gkd_logits_topk": 7, "gkd_topk_tail": "renormalize", "temperature": 0.7},
    "bucket": {"gkd_logits_topk": 7, "gkd_topk_tail": "bucket", "temperature": 1.0},
}


@pytest.fixture(scope="module")
def fake_server() -> Iterator[FakeServer]:
    _, teacher = models("dense")
    with FakeServer(teacher) as server:
        yield server


@pytest.fixture(scope="module")
def by_server(gloo_world, fake_server):
    @functools.cache
    def of(layout: str, tail: str):
        world_size, changes = DENSE[layout]
        server = {"teacher": {"teacher_model": None, "teacher_model_server": fake_server.url}}
        changes = changes | server | {"distill": TAILS[tail]}
        return gloo_world(world_size).run(train_steps, models("dense")[0], None, changes)[0]

    return of


@pytest.mark.parametrize("tail", TAILS)
def test_equals_the_local_teachers_top_k(tail, gloo_world, by_server):
    local = gloo_world(1).run(train_steps, *models("dense"), {"distill": TAILS[tail]})[0]
    assert_equal_runs(by_server("micro batch 2", tail), local, tolerance=1e-4)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_equals_one_process(layout, tail, by_server):
    assert_equal_runs(by_server(layout, tail), by_server("micro batch 2", tail))

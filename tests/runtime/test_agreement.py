"""Failures of one rank are raised in all, and results of the main rank reach all."""

import pytest

from megatron_gkd.errors import RunStopped, ServiceError, UserError
from megatron_gkd.runtime.agreement import run_on_all, run_on_main
from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh


def _fail_in_rank_1(rank, world_size, error):
    def work():
        if rank == 1:
            raise error

    with pytest.raises(RunStopped) as caught:
        run_on_all(work, RunStopped, os_error="out: can't be written")
    return str(caught.value), caught.value.exit_code, type(caught.value.__cause__)


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (UserError("wrong"), "wrong", 2),
        (ServiceError("gone"), "gone", 69),
        (OSError("disk full"), "out: can't be written (disk full)", 2),
    ],
)
def test_a_failure_of_one_rank_is_raised_in_all_and_keeps_its_cause_there(gloo_world, error, message, code):
    found = gloo_world(2).run(_fail_in_rank_1, error)
    assert found == [(message, code, type(None)), (message, code, type(error))]


def _crash_in_rank_1(rank, world_size):
    def work():
        if rank == 1:
            raise KeyError("missing") from ValueError("its reason")

    try:
        run_on_all(work)
    except Exception as error:
        return type(error), str(error), getattr(error, "exit_code", None), str(error.__cause__)


def test_an_unexpected_exception_is_raised_in_its_rank_and_named_in_the_others(gloo_world):
    first, second = gloo_world(2).run(_crash_in_rank_1)
    assert first == (UserError, "rank 1 failed: KeyError: 'missing'", 1, "None")
    assert second == (KeyError, "'missing'", None, "its reason")


def _results(rank, world_size):
    return run_on_main(lambda: {"by": rank}), run_on_all(lambda: rank)


def test_every_rank_gets_the_result_of_the_main_rank_or_its_own(gloo_world):
    assert gloo_world(2).run(_results) == [({"by": 0}, 0), ({"by": 0}, 1)]


def _leaders(rank, world_size, layout):
    mesh = initialize_mesh(Layout(**layout), seed=1)
    try:
        return mesh.is_last_stage, mesh.is_leader, mesh.broadcast_from_leader(rank if mesh.is_leader else None)
    finally:
        destroy_mesh()


@pytest.mark.parametrize("layout", [{"tensor": 2, "pipeline": 2}, {"pipeline": 2, "context": 2}])
def test_a_replica_has_one_leader_from_which_its_ranks_receive(gloo_world, layout):
    last_stage, leader, received = zip(*gloo_world(4).run(_leaders, layout), strict=True)
    assert last_stage == (False, False, True, True)
    assert leader == (False, False, True, False)
    assert received == (2,) * 4

"""The test harness itself: results, exceptions, hanging and dying ranks, and recovery after each."""

import os
import time
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from world import RemoteTraceback, World


@dataclass
class Point:
    x: int


def add_ranks(rank, world_size, start, *, point=None):
    total = torch.tensor([float(start + rank)], requires_grad=True) * 1
    dist.all_reduce(total.data)
    return {"total": total, "point": point and Point(point.x + rank), "pid": os.getpid(), "size": world_size}


def fail_on(rank, world_size, bad_rank):
    if rank == bad_rank:
        raise KeyError("missing thing")
    dist.barrier()  # never completes: the bad rank does not come


def hang(rank, world_size):
    if rank == 1:
        time.sleep(60)


def die(rank, world_size):
    os._exit(7)


def random_number(rank, world_size):
    return torch.rand(1).item()


def test_results_come_back_in_rank_order_from_persistent_processes(gloo_world):
    world = gloo_world(2)
    first = world.run(add_ranks, 10, point=Point(5))
    assert [result["total"].item() for result in first] == [21.0, 21.0]
    assert [result["point"] for result in first] == [Point(5), Point(6)]
    assert all(result["size"] == 2 and not result["total"].requires_grad for result in first)
    second = world.run(add_ranks, 0)
    assert [result["pid"] for result in second] == [result["pid"] for result in first]


def test_every_call_starts_from_the_same_seed(gloo_world):
    world = gloo_world(2)
    assert len({*world.run(random_number), *world.run(random_number)}) == 1


def test_an_exception_carries_its_ranks_traceback_and_the_next_call_works():
    world = World(2)
    with pytest.raises(KeyError, match="missing thing") as caught:
        world.run(fail_on, 1)
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert caught.value.__cause__.rank == 1
    assert "in fail_on" in str(caught.value.__cause__)
    assert [result["total"].item() for result in world.run(add_ranks, 0)] == [1.0, 1.0]
    world.close()


def test_a_hanging_rank_is_killed_after_the_timeout_and_its_stack_shown():
    world = World(2)
    world.run(add_ranks, 0)
    processes = list(world._processes)
    with pytest.raises(TimeoutError, match=r"ranks \[1\](?s:.*)in hang"):
        world.run(hang, timeout=1.0)
    assert not any(process.is_alive() for process in processes)
    assert len(world.run(add_ranks, 0)) == 2
    world.close()


def test_a_rank_that_dies_is_reported():
    world = World(1)
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        world.run(die)
    world.close()

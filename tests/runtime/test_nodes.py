"""Ranks wait for one of them without a limit while it is alive, and stop when it has failed or died."""

import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from ports import free_port
from world import process_queue, start_process

from megatron_gkd.errors import GkdError, ServiceError, UserError
from megatron_gkd.runtime import nodes as module
from megatron_gkd.runtime.nodes import Nodes

HOST = socket.gethostname()


def _rank(rank, world_size, path, leaders, limits, results, calls, args):
    for name, value in limits.items():
        setattr(module, name, value)
    store = dist.FileStore(path, -1)
    store.set_timeout(timedelta(seconds=0.5))
    nodes = Nodes(store, rank, world_size, is_leader=rank in leaders)
    try:
        results.put((rank, globals()[calls](nodes, rank, *args)))
    except BaseException as error:
        shared = "" if getattr(error, "is_shared", True) else ", not shared"
        code = getattr(error, "exit_code", None)
        results.put((rank, f"{type(error).__name__}{shared}", str(error), *([] if code is None else [code])))


class Ranks:
    """Processes that share a store with a time-out of half a second; ``calls(nodes, rank, *args)`` runs in each."""

    def __init__(self, path):
        self.path, self.processes = str(path), []

    def start(self, calls, *args, world_size=3, leaders=(0,), limits=()):
        self.results = process_queue()
        shared = (world_size, self.path, leaders, dict(limits), self.results, calls.__name__, args)
        self.processes = [start_process(_rank, rank, *shared) for rank in range(world_size)]

    def collect(self, count):
        """Return what `count` ranks have returned, or the type and text of their errors, by ranks."""
        found = {rank: tuple(rest) for rank, *rest in (self.results.get(timeout=60) for _ in range(count))}
        for process in self.processes:
            process.join(timeout=20)
        return found

    def run(self, calls, *args, world_size=3, leaders=(0,)):
        self.start(calls, *args, world_size=world_size, leaders=leaders)
        return [answer for _, answer in sorted(self.collect(world_size).items())]


@pytest.fixture
def ranks(tmp_path):
    ranks = Ranks(tmp_path / "store")
    yield ranks
    for process in ranks.processes:
        process.kill()


def _work_twice_on_main(nodes, rank):
    first = nodes.on_main(lambda: time.sleep(1.2) or {"by": rank})
    return first, nodes.on_main(lambda: (rank, [None]))


def test_all_ranks_get_the_result_of_rank_0_however_long_it_takes(ranks):
    assert ranks.run(_work_twice_on_main) == [(({"by": 0}, (0, [None])),)] * 3


def _work_on_leaders(nodes, rank):
    done = []
    start = time.monotonic()
    nodes.on_leaders(lambda: done.append(rank) or time.sleep(0.4 * rank))
    return done, time.monotonic() - start > 0.7, nodes.on_all(lambda: rank)


def test_each_node_works_once_and_all_wait_for_the_slowest(ranks):
    assert ranks.run(_work_on_leaders, leaders=(0, 2)) == [(([0], True, 0),), (([], True, 1),), (([2], True, 2),)]


def _fail_in(nodes, rank, failing, error):
    def work():
        if rank == failing:
            raise error

    nodes.on_leaders(work)


@pytest.mark.parametrize(("failing", "where"), [(0, ""), (2, f"rank 2 on {HOST}: ")])
@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (UserError("bad row"), "bad row", 2),
        (ServiceError("no server"), "no server", 69),
        (OSError("full"), "OSError: full", 1),
    ],
)
def test_a_failure_of_one_rank_is_raised_in_all_with_its_exit_code(ranks, failing, where, error, text, code):
    answers = ranks.run(_fail_in, failing, error, leaders=(0, 2))
    shared = ("RunStopped", where + text, code)
    assert answers[failing] == (("OSError", "full") if isinstance(error, OSError) else shared)
    assert [answer for rank, answer in enumerate(answers) if rank != failing] == [shared] * 2


def _fail_while_another_works(nodes, rank, seconds):
    def work():
        if rank == 2:
            raise UserError("no such file")
        time.sleep(seconds if rank == 1 else 0)

    nodes.on_leaders(work)


def test_a_failure_is_raised_before_the_others_finish(ranks):
    ranks.start(_fail_while_another_works, 60, world_size=4, leaders=(0, 1, 2))
    start = time.monotonic()
    assert ranks.results.get(timeout=50)[0] in (2, 3)
    assert time.monotonic() - start < 50


def _die(nodes, rank, dying):
    def work():
        time.sleep(2.5)  # longer than a rank may be silent
        if rank == dying:
            os.kill(os.getpid(), signal.SIGKILL)

    nodes.on_leaders(work)


@pytest.mark.parametrize("dying", [0, 2])
def test_a_rank_that_dies_ends_the_wait(ranks, dying):
    limits = {"BEAT_EVERY_S": 0.1, "DEAD_AFTER_S": 2.0, "READ_WITHIN_S": 0.5}
    ranks.start(_die, dying, leaders=(0, 2), limits=limits)
    answers = ranks.collect(2)
    assert set(answers) == {0, 1, 2} - {dying}
    assert {(text, code) for _, text, code in answers.values()} == {
        (f"rank {dying} on {HOST} has sent no heartbeat for 2 s; it has probably died", 1)
    }
    # Rank 0 prints what all raise together; if it is the dead one, another has to.
    assert ("RunStopped, not shared" in {kind for kind, *_ in answers.values()}) == (dying == 0)


def _stay_away(nodes, rank):
    return rank == 2 or nodes.on_main(lambda: 1)


def test_a_rank_that_never_calls_ends_the_wait(ranks):
    ranks.start(_stay_away, limits={"BEAT_EVERY_S": 0.1, "ARRIVE_WITHIN_S": 0.5, "READ_WITHIN_S": 0.5})
    answers = ranks.collect(3)
    assert answers[2] == (True,)
    assert answers[0][1] == answers[1][1] == "only 2 of 3 ranks came to this point within 0 s"
    assert {answers[0][0], answers[1][0]} <= {"RunStopped", "RunStopped, not shared"}


def _leave_with_the_store(number, port, results):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=number == 0)
    try:
        Nodes(store, number, 2, is_leader=False).on_main(lambda: os._exit(7))
    except GkdError as error:
        results.put(str(error))


def test_the_end_of_rank_0_ends_the_others():
    results = process_queue()
    port = free_port()
    processes = [start_process(_leave_with_the_store, number, port, results) for number in range(2)]
    assert results.get(timeout=60).startswith("the connection to rank 0 is lost, which has probably ended")
    for process in processes:
        process.join()


def test_one_process_is_every_node():
    nodes = Nodes.alone()
    assert nodes.on_main(lambda: nodes.on_all(lambda: 3)) == 3
    with pytest.raises(OSError, match="full"):
        nodes.on_leaders(_fail)


def _fail():
    raise OSError("full")

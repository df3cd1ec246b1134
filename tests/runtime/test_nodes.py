"""Ranks that wait for one of them: without a limit while it lives, and not at all when it has failed or died."""

import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import nodes as module
from megatron_gkd.runtime.nodes import Nodes

HOST = socket.gethostname()


def _rank(rank, world_size, store, results, calls, leaders):
    nodes = Nodes(store(rank), rank, world_size, is_leader=rank in leaders)
    try:
        results.put((rank, calls(nodes, rank)))
    except BaseException as error:
        results.put((rank, type(error).__name__, str(error)))
    results.close()
    results.join_thread()
    os._exit(0)  # a fork of pytest's process must not tear down the libraries that it shares with it


class Ranks:
    """Processes that share a store with a time-out of half a second; `calls(nodes, rank)` runs in each."""

    def __init__(self, tmp_path):
        self.path = str(tmp_path / "store")

    def store(self, rank):
        store = dist.FileStore(self.path, -1)
        store.set_timeout(timedelta(seconds=0.5))
        return store

    def start(self, calls, world_size=3, leaders=(0,)):
        context = multiprocessing.get_context("fork")
        self.results = context.Queue()
        self.processes = [
            context.Process(target=_rank, args=(rank, world_size, self.store, self.results, calls, leaders))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def collect(self, count):
        """What `count` ranks have returned, or the type and text of their errors, by ranks."""
        found = dict(answer[:1] + (answer[1:],) for answer in (self.results.get(timeout=20) for _ in range(count)))
        for process in self.processes:
            process.join(timeout=20)
        return found

    def run(self, calls, world_size=3, leaders=(0,)):
        self.start(calls, world_size, leaders)
        return [answer for _, answer in sorted(self.collect(world_size).items())]


@pytest.fixture
def ranks(tmp_path):
    ranks = Ranks(tmp_path)
    yield ranks
    for process in ranks.processes:
        process.kill()


def test_what_rank_0_has_done_is_known_to_all_however_long_it_took(ranks):
    def calls(nodes, rank):
        first = nodes.on_main(lambda: time.sleep(1.2) or {"by": rank})
        return first, nodes.on_main(lambda: (rank, [None]))

    assert ranks.run(calls) == [(({"by": 0}, (0, [None])),)] * 3


def test_each_node_works_once_and_all_wait_for_the_slowest(ranks):
    def calls(nodes, rank):
        done = []
        start = time.monotonic()
        nodes.on_leaders(lambda: done.append(rank) or time.sleep(0.4 * rank))
        return done, time.monotonic() - start > 0.7, nodes.on_all(lambda: rank)

    assert ranks.run(calls, leaders=(0, 2)) == [(([0], True, 0),), (([], True, 1),), (([2], True, 2),)]


@pytest.mark.parametrize(("failing", "where"), [(0, ""), (2, f"rank 2 on {HOST}: ")])
@pytest.mark.parametrize(("error", "text"), [(UserError("bad row"), "bad row"), (OSError("full"), "OSError: full")])
def test_what_fails_in_one_rank_is_raised_in_all(ranks, failing, where, error, text):
    def calls(nodes, rank):
        def work():
            if rank == failing:
                raise error

        nodes.on_leaders(work)

    answers = ranks.run(calls, leaders=(0, 2))
    shared = ("RunStopped", where + text)
    assert answers[failing] == (("OSError", "full") if isinstance(error, OSError) else shared)
    assert [answer for rank, answer in enumerate(answers) if rank != failing] == [shared] * 2


def test_a_failure_is_not_kept_until_others_have_finished(ranks):
    def calls(nodes, rank):
        def work():
            if rank == 2:
                raise UserError("no such file")
            time.sleep(8 if rank == 1 else 0)

        nodes.on_leaders(work)

    start = time.monotonic()
    ranks.start(calls, world_size=4, leaders=(0, 1, 2))
    assert ranks.results.get(timeout=5)[0] in (2, 3)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("dying", [0, 2])
def test_a_rank_that_dies_ends_the_wait(ranks, dying, monkeypatch):
    monkeypatch.setattr(module, "BEAT_EVERY_S", 0.1)
    monkeypatch.setattr(module, "DEAD_AFTER_S", 1.0)
    monkeypatch.setattr(module, "READ_WITHIN_S", 0.5)

    def calls(nodes, rank):
        def work():
            time.sleep(1.5)  # longer than a rank may be silent
            if rank == dying:
                os.kill(os.getpid(), signal.SIGKILL)

        nodes.on_leaders(work)

    ranks.start(calls, leaders=(0, 2))
    answers = ranks.collect(2)
    assert set(answers) == {0, 1, 2} - {dying}
    assert {text for _, text in answers.values()} == {
        f"rank {dying} on {HOST} has shown no sign of life for 1 s; it has probably died"
    }
    # Rank 0 prints what all raise together; if it is the dead one, another has to.
    assert ("UserError" in {kind for kind, _ in answers.values()}) == (dying == 0)


def test_a_rank_that_never_comes_ends_the_wait(ranks, monkeypatch):
    monkeypatch.setattr(module, "BEAT_EVERY_S", 0.1)
    monkeypatch.setattr(module, "ARRIVE_WITHIN_S", 0.5)
    monkeypatch.setattr(module, "READ_WITHIN_S", 0.5)
    ranks.start(lambda nodes, rank: rank == 2 or nodes.on_main(lambda: 1))
    answers = ranks.collect(3)
    assert answers[2] == (True,)
    assert answers[0][1] == answers[1][1] == "only 2 of 3 ranks came to this point within 0 s"
    assert {answers[0][0], answers[1][0]} <= {"UserError", "RunStopped"}


def test_the_store_goes_with_rank_0(tmp_path):
    def rank(number, port, results):
        store = dist.TCPStore("127.0.0.1", port, 2, is_master=number == 0)
        try:
            Nodes(store, number, 2, is_leader=False).on_main(lambda: os._exit(7))
        except UserError as error:
            results.put(str(error))

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [context.Process(target=rank, args=(number, port, results)) for number in range(2)]
    for process in processes:
        process.start()
    assert results.get(timeout=20).startswith("the connection to rank 0 is lost, which has probably ended")
    for process in processes:
        process.join()


def test_one_process_is_every_node():
    nodes = Nodes.alone()
    assert nodes.on_main(lambda: nodes.on_all(lambda: 3)) == 3
    with pytest.raises(OSError, match="full"):
        nodes.on_leaders(_fail)


def _fail():
    raise OSError("full")

"""Run work on one rank of the run, or on one rank of each node, while the other ranks wait without a time limit.

The ranks wait on the process group's store. A collective would end the run after the group's time-out, which is
shorter than a large download or the tokenization of a large file.
"""

from __future__ import annotations

import itertools
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from megatron_gkd.errors import GkdError, RunStopped

BEAT_EVERY_S = 5.0  # interval of a working rank's heartbeats
DEAD_AFTER_S = 120.0  # a rank without a heartbeat for so long ends the run
ARRIVE_WITHIN_S = 1800.0  # a rank that has not made a call after this time ends the run
UNEXPECTED = 1  # exit code after an exception that is no GkdError, or a rank that has died
READ_WITHIN_S = 10.0  # rank 0, which may hold the store, waits so long until the others have read a failure

T = TypeVar("T")
_objects = itertools.count()  # equal on every rank, since all ranks make `Nodes` in the same order


class Nodes:
    """The ranks of a run, one of which is the leader of each node.

    All ranks must make the same calls in the same order. What fails in one rank is raised in all, as RunStopped; only
    an exception that is no GkdError stays as it is in that rank.

    Args:
        store: shared by the ranks, and used for nothing else.
        rank: of this process in the world.
        world_size: number of ranks.
        is_leader: whether this rank is its node's leader. Rank 0 always is.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, *, is_leader: bool) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self.is_main = rank == 0
        self.is_leader = is_leader or self.is_main
        self._calls = itertools.count()

    @classmethod
    def from_world(cls) -> Nodes:
        """Return the nodes of the default process group; rank 0 of each (LOCAL_RANK) is its leader."""
        store = dist.PrefixStore(f"nodes/{next(_objects)}", _get_default_store())
        is_leader = int(os.environ.get("LOCAL_RANK", "0")) == 0
        return cls(store, dist.get_rank(), dist.get_world_size(), is_leader=is_leader)

    @classmethod
    def alone(cls) -> Nodes:
        """Return the one node of a process without a process group."""
        return cls(dist.HashStore(), 0, 1, is_leader=True)

    def on_main(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result, which must be picklable, on every rank."""
        return self._call(work, is_worker=self.is_main, broadcasts=True)

    def on_leaders(self, work: Callable[[], Any]) -> None:
        """Run `work` on one rank of each node."""
        self._call(work, is_worker=self.is_leader)

    def on_all(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return each rank its own result."""
        return self._call(work, is_worker=True)

    def _call(self, work: Callable[[], Any], *, is_worker: bool, broadcasts: bool = False) -> Any:
        call = dist.PrefixStore(str(next(self._calls)), self._store)
        name = f"rank {self._rank} on {socket.gethostname()}"
        try:
            with _Heartbeat(call, name, is_main=self.is_main, is_needed=is_worker or self.is_main):
                result = self._work(call, name, work) if is_worker else None
                if broadcasts and self.is_main:
                    call.set("result", pickle.dumps(result))  # type: ignore[arg-type]  # torch takes bytes, its stub not
                call.add("done", 1)
                self._wait(call)
                return pickle.loads(call.get("result")) if broadcasts else result
        except dist.DistError as error:
            raise RunStopped(
                f"the connection to rank 0 is lost, which has probably ended; see its message ({error})",
                exit_code=UNEXPECTED,
                is_shared=False,
            ) from error

    def _work(self, call: dist.Store, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except BaseException as error:
            text = str(error) if isinstance(error, GkdError) else f"{type(error).__name__}: {error}"
            text = text if self.is_main else f"{name}: {text}"
            code = error.exit_code if isinstance(error, GkdError) else UNEXPECTED
            _post_failure(call, text, code)
            if isinstance(error, Exception):  # not for Ctrl-C, which should end at once
                self._let_others_read(call)
            if isinstance(error, GkdError):
                raise RunStopped(text, exit_code=code) from error
            raise

    def _wait(self, call: dist.Store) -> None:
        """Return when every rank has done its part; raise what went wrong in any of them."""
        watch, pause = _Watch(call, self._world_size, is_main=self.is_main), 0.005
        while True:
            is_done = call.add("done", 0) == self._world_size
            if call.check(["failure"]):
                self._let_others_read(call)
                code, _, text = call.get("failure").decode().partition(" ")
                raise RunStopped(text, exit_code=int(code))
            if is_done:
                return
            problem = watch.find_problem()
            if problem is not None:
                _post_failure(call, problem, UNEXPECTED)
                if not self.is_main:
                    raise RunStopped(
                        problem, exit_code=UNEXPECTED, is_shared=False
                    )  # rank 0, which prints shared ones, may be gone
                continue
            time.sleep(pause)
            pause = min(1.0, 1.5 * pause)

    def _let_others_read(self, call: dist.Store) -> None:
        """Count this rank as one that has read the failure; rank 0 waits for the others, as it may hold the store."""
        call.add("readers", 1)
        deadline = time.monotonic() + READ_WITHIN_S
        while self.is_main and call.add("readers", 0) < self._world_size and time.monotonic() < deadline:
            time.sleep(0.05)


def _post_failure(call: dist.Store, text: str, code: int) -> None:
    """Let all ranks of a call raise `text`, with the exit code of its cause."""
    call.set("failure", f"{code} {text}")


class _Heartbeat:
    """A thread that increments a counter in the store while this rank works in a call. Rank 0 has the number 0."""

    def __init__(self, call: dist.Store, name: str, *, is_main: bool, is_needed: bool) -> None:
        self._call, self._stopped = call, threading.Event()
        call.add("arrived", 1)
        if is_needed:
            self._number = 0 if is_main else call.add("workers", 1)
            call.set(f"name/{self._number}", name)
        self._thread = threading.Thread(target=self._beat, daemon=True) if is_needed else None

    def __enter__(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def __exit__(self, *_: Any) -> None:
        if self._thread is None:
            return
        self._stopped.set()
        self._thread.join()
        try:
            self._call.set(f"finished/{self._number}", "")
        except dist.DistError:
            pass  # rank 0 has ended with the store; the call raises an error

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_EVERY_S):
            try:
                self._call.add(f"beats/{self._number}", 1)
            except dist.DistError:
                return


class _Watch:
    """Finds ranks that have died: rank 0 watches all working ranks, the others watch rank 0."""

    def __init__(self, call: dist.Store, world_size: int, *, is_main: bool) -> None:
        self._call, self._world_size, self._is_main = call, world_size, is_main
        self._start = self._last = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}

    def find_problem(self) -> str | None:
        now = time.monotonic()
        if now - self._last < BEAT_EVERY_S:
            return None
        self._last = now
        if now - self._start > ARRIVE_WITHIN_S and (arrived := self._call.add("arrived", 0)) < self._world_size:
            return f"only {arrived} of {self._world_size} ranks came to this point within {ARRIVE_WITHIN_S:.0f} s"
        for number in range(1, self._call.add("workers", 0) + 1) if self._is_main else [0]:
            if not self._call.check([f"name/{number}"]) or self._call.check([f"finished/{number}"]):
                continue
            beats = self._call.add(f"beats/{number}", 0)
            known, since = self._seen.setdefault(number, (beats, now))
            if beats != known:
                self._seen[number] = (beats, now)
            elif now - since > DEAD_AFTER_S:
                name = self._call.get(f"name/{number}").decode()
                return f"{name} has sent no heartbeat for {DEAD_AFTER_S:.0f} s; it has probably died"
        return None

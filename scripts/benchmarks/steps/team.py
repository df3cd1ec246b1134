"""The processes of one contestant, which stay from case to case."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.peers import Unavailable
from benchmarks.steps.cases import Case
from benchmarks.steps.turns import StepSample, Turns

DEADLINE_S = 600.0  # of a response
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class Failed(Exception):
    """A contestant has not run: the reason is its text, and `install` the command that would change it, or ""."""

    def __init__(self, reason: str, install: str = "") -> None:
        super().__init__(reason)
        self.install = install


@dataclass(frozen=True)
class _Failure:
    reason: str
    install: str = ""


class Team:
    """The processes of one contestant.

    Args:
        module: module of this package with a class `Contestant`.
        arguments: of its constructor.
        processes: their number.
        root: a folder of its own, where they meet.
        clock: of steps and phases: "wall" or "cpu".
    """

    def __init__(self, module: str, arguments: dict[str, Any], processes: int, root: Path, clock: str = "wall") -> None:
        root.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(processes):
            ours, theirs = context.Pipe()
            work = (theirs, (module, arguments), (rank, processes, root), CLOCKS[clock])
            process = context.Process(target=_serve, args=work, daemon=True)
            process.start()
            theirs.close()
            self._ends.append(ours)
            self._processes.append(process)

    def build(self, case: Case, folder: Path) -> None:
        """Build the models in all processes.

        Raises:
            Failed: they can't.
        """
        for end in self._ends:
            end.send((case, folder))
        for end in self._ends:
            _receive(end)

    def step(self, threads: int) -> list[StepSample]:
        """Do one step; return the samples of all processes."""
        for end in self._ends:
            end.send(threads)
        return [_receive(end) for end in self._ends]

    def release(self) -> None:
        """Drop the models."""
        for end in self._ends:
            end.send(None)
        for end in self._ends:
            _receive(end)

    def close(self) -> None:
        """End the processes."""
        for end in self._ends:
            end.close()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()


def _receive(end: Connection) -> Any:
    try:
        if not end.poll(DEADLINE_S):
            raise Failed(f"no response within {DEADLINE_S:.0f} s")
        response = end.recv()
    except (EOFError, ConnectionError) as error:
        raise Failed("a process has ended, perhaps for lack of memory") from error
    if isinstance(response, _Failure):
        raise Failed(response.reason, response.install)
    return response


def _serve(
    connection: Connection, kind: tuple[str, dict[str, Any]], place: tuple[int, int, Path], now: Callable[[], float]
) -> None:
    """Run cases until the parent closes the connection."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import importlib

    import torch

    torch.set_num_threads(1)
    contestant = None
    while True:
        try:
            case, folder = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            if contestant is None:
                module = importlib.import_module(f"benchmarks.steps.{kind[0]}")
                contestant = module.Contestant(*place, **kind[1])
            contestant.run(case, folder, Turns(connection, now))
            connection.send("released")
        except Unavailable as unavailable:
            connection.send(_Failure(unavailable.reason, unavailable.install))
        except Exception as error:
            traceback.print_exc()
            connection.send(_Failure(f"failed: {type(error).__name__}: {error}"[:300]))

"""The messages between a contestant's process and its parent."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from benchmarks.memory import reset_peak, status_bytes, trim
from benchmarks.steps.cases import Case


@dataclass(frozen=True)
class StepSample:
    """What one process measures in one step.

    Attributes:
        seconds: of the step.
        cpu_seconds: that the process has computed in the step.
        phases: seconds by name of phase; the rest is `other`.
        peak_bytes: resident memory at its peak, less that of the process before the models were built; None where it
            can't be measured.
        loss: of the step's rows before the update; None where there is none.
    """

    seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    peak_bytes: int | None
    loss: float | None


class Contestant(Protocol):
    """A way to train, in one of its processes."""

    def run(self, case: Case, folder: Path, turns: Turns) -> None:
        """Build the models that `case` has saved in `folder`, and do a step in each turn.

        Raises:
            Unavailable: a package is missing.
        """


@dataclass
class PhaseClock:
    """Adds up the seconds of phases; a phase inside another one does not count in it.

    Attributes:
        now: the clock; that of the processor is little disturbed by other work on the machine, but does not see waits.
        seconds: by name of phase.
    """

    now: Callable[[], float] = time.perf_counter

    seconds: dict[str, float] = field(default_factory=dict)
    _inner: list[float] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self.now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            taken = self.now() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - self._inner.pop()
            if self._inner:
                self._inner[-1] += taken

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function as a phase."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.phase(name):
                return function(*arguments, **options)

        return timed

    def take(self) -> dict[str, float]:
        """Return the seconds since the last call."""
        taken, self.seconds = self.seconds, {}
        return taken


class Turns:
    """The steps of one process, each of which the parent starts.

    Args:
        connection: to the parent.
        now: the clock of phases and steps.
    """

    def __init__(self, connection: Connection, now: Callable[[], float] = time.perf_counter) -> None:
        self._connection = connection
        self._base = trim() or 0
        self._is_ready = False
        self.clock = PhaseClock(now)

    def begin(self) -> bool:
        """Wait for the next turn, and start the clock. Return False if there is none."""
        if not self._is_ready:
            self._connection.send("ready")
            self._is_ready = True
        threads = self._connection.recv()
        if threads is None:
            return False
        torch.set_num_threads(threads)
        gc.collect()
        self._has_peak = reset_peak()
        self.clock.take()
        _meet()
        self._start, self._cpu_start = self.clock.now(), time.process_time()
        return True

    def end(self, loss: float | None, phases: Mapping[str, float] | None = None) -> None:
        """Stop the clock, and report the step."""
        _meet()
        seconds, cpu_seconds = self.clock.now() - self._start, time.process_time() - self._cpu_start
        peak = status_bytes("VmHWM") - self._base if self._has_peak else None
        phases = self.clock.take() if phases is None else dict(phases)
        self._connection.send(StepSample(seconds, cpu_seconds, phases, peak, loss))


def _meet() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()

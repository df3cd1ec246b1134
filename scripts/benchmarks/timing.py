"""Seconds of steps on a device, and repetitions of several contestants in turn."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Sample = TypeVar("Sample")

FLUSH_BYTES = {"cuda": 256 << 20, "cpu": 64 << 20}  # well over the last cache level
COPY_BYTES = {"cuda": 1 << 30, "cpu": 256 << 20}


@dataclass(frozen=True)
class Plan:
    """How often each contestant runs: `repeats` times, or fewer once it has used `seconds`, but `least` times.

    Where one time is enough, a warm-up that used up `seconds` is that one: a cold start is little beside it.
    """

    repeats: int
    least: int
    seconds: float


# On a CPU eager torch takes seconds, and one repetition of the slowest peers has to do.
PLANS = {"cuda": Plan(repeats=50, least=3, seconds=0.5), "cpu": Plan(repeats=7, least=1, seconds=9.0)}


class Stopwatch:
    """Times steps that each start with cold caches: CUDA events on a GPU, the wall clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.ones(FLUSH_BYTES[device.type], dtype=torch.int8, device=device)

    def laps(self, *steps: Callable[[], object]) -> list[float]:
        """Run the steps in order and return the seconds of each. On a GPU all are launched before the first ends."""
        self._flush.zero_()
        if self.device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
            marks[0].record()
            for step, mark in zip(steps, marks[1:], strict=True):
                step()
                mark.record()
            torch.cuda.synchronize()
            return [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)]
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return [b - a for a, b in itertools.pairwise(marks)]


class Copy:
    """A large device-to-device copy: the yardstick for memory bandwidth."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        device = stopwatch.device
        self.moved_bytes = 2 * COPY_BYTES[device.type]  # read and written
        self._source, self._target = (
            torch.ones(COPY_BYTES[device.type], dtype=torch.int8, device=device) for _ in range(2)
        )

    def seconds(self) -> float:
        return self._stopwatch.laps(lambda: self._target.copy_(self._source))[0]


class Read:
    """A large read, reduced to its maximum: the yardstick for passes that write next to nothing."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch
        self.moved_bytes = COPY_BYTES[stopwatch.device.type]
        self._source = torch.ones(self.moved_bytes // 4, dtype=torch.float32, device=stopwatch.device)

    def seconds(self) -> float:
        return self._stopwatch.laps(lambda: self._source.amax())[0]


def in_turn(runs: Mapping[str, Callable[[], Sample]], plan: Plan) -> dict[str, list[Sample]]:
    """Repeat the runs in turn, so that drift affects all alike, and return the results of each."""
    samples: dict[str, list[Sample]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for turn in range(plan.repeats):
        for name, run in runs.items():
            if turn < plan.least or spent[name] < plan.seconds:
                start = time.perf_counter()
                samples[name].append(run())
                spent[name] += time.perf_counter() - start
    return samples

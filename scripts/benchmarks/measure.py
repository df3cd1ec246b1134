"""A competition: several ways to do the same work, each warmed up and checked once, then run in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from benchmarks.memory import PeakMemory
from benchmarks.peers import Unavailable
from benchmarks.timing import Copy, Plan, Read, Stopwatch, in_turn

COPY, READ = "copy", "read"
OURS = "megatron_gkd"


class Work:
    """Steps without autograd, timed one by one. What they need is compiled before."""

    def __init__(self, *steps: Callable[[], object], error: Callable[[], float] | None = None) -> None:
        self.steps = steps
        self._error = error

    def error(self) -> float | None:
        """Return the relative error of the result; None where none is measured."""
        return None if self._error is None else self._error()

    def release(self) -> None:
        """Drop the results of the steps."""


class TrainingWork(Work):
    """Forward, then the gradients of its scalar by `inputs`; `error` is a function of these gradients."""

    def __init__(
        self, loss: Callable[[], Tensor], inputs: tuple[Tensor, ...], error: Callable[[tuple[Tensor, ...]], float]
    ) -> None:
        super().__init__(self._forward, self._backward, error=lambda: error(self._gradients))
        self._loss, self._inputs = loss, inputs
        self._value, self._gradients = None, None

    def _forward(self) -> None:
        self._value = self._loss()

    def _backward(self) -> None:
        self._gradients = torch.autograd.grad(self._value, self._inputs)

    def release(self) -> None:
        self._value = self._gradients = None


@dataclass(frozen=True)
class Sample:
    seconds: list[float]  # of each step
    peak_bytes: int | None  # growth of memory at its peak, results included


@dataclass
class Result:
    """The measurements of one contestant. `status` is "ok", or the reason why there are none."""

    status: str = "ok"
    install: str = ""  # the command that would make it available
    error: float | None = None
    samples: list[Sample] = field(default_factory=list)

    def record(self) -> dict:
        """Return one number a repetition, for JSON. `first_s` is the seconds of the first step (the forward pass)."""
        return {
            "status": self.status,
            "install": self.install,
            "error": self.error,
            "first_s": [sample.seconds[0] for sample in self.samples],
            "total_s": [sum(sample.seconds) for sample in self.samples],
            "peak_bytes": [sample.peak_bytes for sample in self.samples],
        }


def compete(builders: Mapping[str, Callable[[], Work]], plan: Plan, stopwatch: Stopwatch) -> dict:
    """Measure the contestants in turn.

    A peer that isn't available, fails, or needs too much memory has the reason as its status; ours must run.

    Returns:
        The record of each contestant, and the seconds of a copy and a read that are measured between them.
    """
    yardsticks = {COPY: Copy(stopwatch), READ: Read(stopwatch)}
    results: dict[str, Result] = {}
    runs: dict[str, Callable[[], Sample]] = {}
    for name, build in builders.items():
        results[name] = result = Result()
        try:
            work = build()
            warm_up = _sample(work, stopwatch)
            result.error = work.error()
            work.release()
            if plan.least == 1 and sum(warm_up.seconds) > plan.seconds:
                result.samples = [warm_up]
            else:
                runs[name] = partial(_run, work, stopwatch)
        except Unavailable as unavailable:
            result.status, result.install = unavailable.reason, unavailable.install
        except torch.OutOfMemoryError:
            result.status = "out of memory"
        except Exception as error:
            if name.startswith(OURS):
                raise
            result.status = f"failed: {type(error).__name__}: {error}"[:300]
        _release(stopwatch.device)
    samples = in_turn(runs | {name: yardstick.seconds for name, yardstick in yardsticks.items()}, plan)
    rates = {
        name: {"moved_bytes": yardstick.moved_bytes, "seconds": samples.pop(name)}
        for name, yardstick in yardsticks.items()
    }
    for name, found in samples.items():
        results[name].samples = found
    return {**rates, "contestants": {name: result.record() for name, result in results.items()}}


def _release(device: torch.device) -> None:
    """Free what a contestant leaves in caches, or the next one may run out of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _run(work: Work, stopwatch: Stopwatch) -> Sample:
    sample = _sample(work, stopwatch)
    work.release()
    return sample


def _sample(work: Work, stopwatch: Stopwatch) -> Sample:
    with PeakMemory(stopwatch.device) as memory:
        seconds = stopwatch.laps(*work.steps)
    return Sample(seconds, memory.growth)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected| in the Euclidean norm, in fp64."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()

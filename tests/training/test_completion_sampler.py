"""The order in which student and engine give each other their memory."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from megatron_gkd.rollout.base import Completion, Sampling
from megatron_gkd.training.completion_sampler import CompletionSampler, SampleRequest


class OneRank:
    def rank(self):
        return 0

    def size(self):
        return 1


class Engine:
    def __init__(self, events, fails=False):
        self.events, self.fails = events, fails

    @contextlib.contextmanager
    def resident(self):
        self.events.append("engine wakes up")
        try:
            yield
        finally:
            self.events.append("engine sleeps")

    def generate(self, prompts, sampling, seeds, images=None):
        self.events.append("generate")
        if self.fails:
            raise RuntimeError("out of memory")
        return [Completion([1], [0.0], "stop", 0) for _ in prompts]


@pytest.mark.parametrize("fails", [False, True])
def test_the_student_leaves_before_the_engine_takes_memory_and_returns_after_it_has_freed_it(fails):
    events: list[str] = []

    @contextlib.contextmanager
    def away():
        events.append("student leaves")
        try:
            yield
        finally:
            events.append("student returns")

    sampler = CompletionSampler(Engine(events, fails), Sampling(max_completion_length=2), OneRank(), away)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        sampler.generate_share([SampleRequest(np.array([5]), 0, 2)])
    assert events == ["student leaves", "engine wakes up", "generate", "engine sleeps", "student returns"]

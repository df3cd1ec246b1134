"""Limit the runtime of a run, with time left for one more step and for saving."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

UNKNOWN_SAVE_SHARE = 0.05  # of the limit, kept for saving until a save was measured


@dataclass
class TimeLimit:
    """The time by which a run has to save to end within its limit.

    Attributes:
        seconds: the limit; recipe key `train.max_runtime`.
        started: when it began, in seconds since the epoch.
        longest_save: returns the longest time of a checkpoint so far, in seconds; None before the first.
        longest_step: of the steps so far, with what follows them (validation, exports), in seconds.
    """

    seconds: float
    started: float = field(default_factory=lambda: process_start())
    longest_save: Callable[[], float | None] = lambda: None
    longest_step: float = 0.0
    _step_began: float = field(default_factory=time.time)

    def begin(self) -> None:
        """Note that the first step begins."""
        self._step_began = time.time()

    def step_ended(self) -> None:
        """Note that a step, with all that follows it, has ended, and that the next one begins."""
        now = time.time()
        self.longest_step, self._step_began = max(self.longest_step, now - self._step_began), now

    def is_near(self) -> bool:
        """Return whether another step and a save might not fit any more."""
        save = self.longest_save()
        saving = UNKNOWN_SAVE_SHARE * self.seconds if save is None else 2 * save
        return time.time() + 2 * self.longest_step + saving >= self.started + self.seconds


def process_start() -> float:
    """Return when this run's launcher, or without one this process, was started, in seconds since the epoch."""
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ
    try:
        return psutil.Process(os.getppid() if is_launched else os.getpid()).create_time()
    except psutil.Error:
        return time.time()

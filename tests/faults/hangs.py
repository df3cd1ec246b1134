"""What is done to one rank of a run in a chosen step: it stops, hangs, is slow, or fails while the others wait."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Deed = Literal["stop", "sleep", "slow", "wait", "raise"]


@dataclass(frozen=True)
class Hang:
    """Done in ranks of one launch; picklable, as `forked_launch.Launch.prepare`.

    Attributes:
        deed: stop the process; sleep for good; be slow in each step; wait for long with progress; raise KeyError.
        rank: to which it is done.
        target: the method of `Trainer` that begins with it.
        step: from 1.
        deaf: a rank that sleeps in that step in place of its work, as one that waits in a collective of NCCL does.
        meeting_s: how long a rank that fails waits for the others to fail.
    """

    deed: Deed
    rank: int
    target: str = "score"
    step: int = 3
    deaf: int | None = None
    meeting_s: float = 2.0

    def __call__(self, rank: int) -> None:
        """Wrap the method in this rank."""
        import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
        from megatron_gkd.runtime.agreement import FailureMeeting
        from megatron_gkd.training.trainer import Trainer

        FailureMeeting.__init__.__defaults__ = (self.meeting_s,)
        if rank not in (self.rank, self.deaf):
            return
        function: Callable[..., Any] = getattr(Trainer, self.target)

        def wrapper(trainer: Trainer, *arguments: Any) -> Any:
            if self.deed == "slow" or trainer.state.step + 1 == self.step:
                _sleep_for_good() if rank == self.deaf else _DEEDS[self.deed]()
            return function(trainer, *arguments)

        setattr(Trainer, self.target, wrapper)


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _sleep_for_good() -> None:
    time.sleep(600)


def _be_slow() -> None:
    time.sleep(2.0)


def _wait_with_progress() -> None:
    from megatron_gkd.runtime.current_phase import note_progress

    for _ in range(40):
        note_progress()
        time.sleep(0.2)


def _raise() -> None:
    raise KeyError("a fault of the program")


_DEEDS: dict[str, Callable[[], None]] = {
    "stop": _stop,
    "sleep": _sleep_for_good,
    "slow": _be_slow,
    "wait": _wait_with_progress,
    "raise": _raise,
}

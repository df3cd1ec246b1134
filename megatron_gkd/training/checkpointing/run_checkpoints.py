"""When a run saves itself, and what it says of itself then."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_gkd.training.checkpointing.saver import Saver
from megatron_gkd.training.checkpointing.state import Saved


@dataclass
class RunCheckpoints:
    """The checkpoints of one run. All ranks must make the same calls.

    Attributes:
        interval: recipe key `output.save_interval`.
        identity: what must be the same to continue; see ``identity``.
        progress: returns the run's plain values, the same on all ranks.
        saved_step: the newest step that a save began for.
        validation: the newest validation's step and divergence, or loss where there is no teacher.
    """

    saver: Saver
    saved: Saved
    interval: int
    identity: dict[str, Any]
    progress: Callable[[], dict[str, Any]] = field(default=dict)
    saved_step: int = 0
    validation: tuple[int, float | None] = (0, None)

    def path_of(self, step: int) -> Path:
        return self.saver.folder.final(step)

    def is_due(self, step: int) -> bool:
        return step % self.interval == 0

    def save(self, step: int) -> bool:
        """Save the run as it is after `step`, once. Returns False if that failed, which is reported."""
        if step == self.saved_step:
            return True
        validated_step, score = self.validation
        run = self.saved.description() | {
            "identity": self.identity,
            "progress": self.progress(),
            "validation": score if validated_step == step and score is not None and math.isfinite(score) else None,
        }
        if not self.saver.save(step, self.saved.to_write(), run):
            return False
        self.saved_step = step
        return True

    def poll(self) -> None:
        """Publish what has been written meanwhile."""
        self.saver.poll()

    def finish(self) -> bool:
        """Wait for the save under way. Returns False if it failed, which is reported."""
        done = self.saver.finish()
        if not done:
            self.saved_step = 0
        return done

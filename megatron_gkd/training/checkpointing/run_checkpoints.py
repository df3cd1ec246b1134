"""The checkpoints of a run: when one is saved, and the plain values in it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.training.checkpointing.saver import Saver
from megatron_gkd.training.checkpointing.state import Saved


@dataclass
class RunCheckpoints:
    """The checkpoints of one run. All ranks must make the same calls.

    Attributes:
        saver: writes the checkpoints.
        saved: the parts of the run that have tensors.
        interval: recipe key `output.save_interval`.
        identity: what must be the same to continue; see ``identity``.
        origin: the path of the checkpoint that the run was resumed from by its name; None where there is none.
        command: how the run is continued from its newest checkpoint, for messages.
        saved_step: the newest step that a save was started for.
        validation: the newest validation's step, and its divergence, or its loss where there is no teacher.
    """

    saver: Saver
    saved: Saved
    interval: int
    identity: dict[str, Any]
    origin: str | None = None
    command: str = "the same command"
    saved_step: int = 0
    validation: tuple[int, float | None] = (0, None)

    def path_of(self, step: int) -> Path:
        """Return the folder of the checkpoint of `step`."""
        return self.saver.folder.final(step)

    def is_due(self, step: int) -> bool:
        """Return whether there is a checkpoint after `step`."""
        return step % self.interval == 0

    def save(self, step: int, progress: Callable[[], dict[str, Any]]) -> bool:
        """Save the run as it is after `step`, once. Returns False if that failed, which is reported.

        Args:
            step: the newest step.
            progress: returns the run's plain values, the same on all ranks. Called if there is anything to save.
        """
        if step == self.saved_step:
            return True
        validated_step, score = self.validation
        run = self.saved.description() | {
            "identity": self.identity,
            "origin": self.origin,
            "progress": progress(),
            "validation": score if validated_step == step and score is not None and math.isfinite(score) else None,
        }
        if not self.saver.save(step, self.saved.to_write(), run):
            return False
        self.saved_step = step
        return True

    def poll(self) -> None:
        """Publish the save under way if it is written."""
        self.saver.poll()

    def finish(self) -> bool:
        """Wait for the save under way, the run's last. Returns False if it failed, which is reported."""
        done = self.saver.finish()
        if done:
            self.saver.keep_order()
        else:
            self.saved_step = 0
        return done

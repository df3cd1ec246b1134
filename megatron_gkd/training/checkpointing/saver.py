"""Write checkpoints in the background, without a process that could block the run when it dies.

Megatron's writer starts processes and waits for them without a time limit. Here each rank copies its share to host
memory, and a thread of its own writes the copy. Once the threads of all ranks are done, the main threads exchange the
names and digests of the files (a collective, at the end of a step) and publish the checkpoint.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.runtime.agreement import holds_everywhere
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, digest
from megatron_gkd.training.checkpointing.marks import Marks
from megatron_gkd.training.checkpointing.sharded_write import SaveFailed, ShardedWrite, on_main


@dataclass(frozen=True)
class _Save:
    """One save under way, on this rank."""

    step: int
    write: ShardedWrite
    started: float


class Saver:
    """Save the state of a run, at most one step at a time, and log each save. All ranks must make the same calls.

    Args:
        folder: the run's checkpoints.
        is_asynchronous: whether `save` returns once this rank's share is copied, or once the checkpoint is complete.
        most: number of newest checkpoints to keep; None: all.
        seconds: longest duration of a save before it is abandoned.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        is_asynchronous: bool = True,
        most: int | None = None,
        seconds: float = 1800.0,
    ) -> None:
        self.folder, self.is_asynchronous, self.most = folder, is_asynchronous, most
        self.seconds = seconds
        self.longest: float | None = None
        """Seconds of the longest save so far, from its snapshot to its publication."""
        self._save: _Save | None = None
        self._marks = Marks(folder)
        self._attempt = 0

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way."""
        return self._save is not None

    def save(self, step: int, state: dict[str, Any], run: dict[str, Any]) -> bool:
        """Save `state`, a sharded state dict, and `run`, plain values, as those of `step`.

        Waits for a save that is under way.

        Returns:
            False if it failed, which is logged: training can continue.
        """
        self.finish()
        self._attempt += 1
        started = time.monotonic()
        try:
            on_main(lambda: self.folder.prepare(step, run, self._attempt))
            self._save = _Save(step, ShardedWrite(state, self._unfinished(step)), started)
        except SaveFailed as error:
            return self._failed(step, str(error))
        return True if self.is_asynchronous else self.finish()

    def poll(self) -> None:
        """Publish the save under way if all ranks have written their share. To be called at the end of each step."""
        save = self._save
        if save is not None and holds_everywhere(not save.write.is_alive()):
            self._publish(save)
        elif save is not None and not holds_everywhere(time.monotonic() - save.started < self.seconds):
            self._give_up(save)

    def finish(self) -> bool:
        """Wait for the save under way, until its time limit. Returns False if it failed."""
        save = self._save
        if save is None:
            return True
        save.write.join(max(0.0, save.started + self.seconds - time.monotonic()))
        if holds_everywhere(not save.write.is_alive()):
            return self._publish(save)
        return self._give_up(save)

    def keep_order(self) -> None:
        """Update `best` and `last`, and delete old checkpoints. A failure here leaves the checkpoints whole.

        A run that is killed just after it has published its last checkpoint does this at the end of the next launch.
        """
        step = self._marks.last()
        if dist.get_rank() != 0 or step is None:
            return
        for problem in self._marks.update():
            LOGGER.warning(f"step {step}: {problem}")
        try:
            if self.most is not None:
                self.folder.remove_old(self.most, keep=self._marks.best())
        except OSError as error:
            LOGGER.warning(f"step {step}: an old checkpoint can't be deleted ({error}); training continues")

    def _unfinished(self, step: int) -> Path:
        return self.folder.unfinished(step, self._attempt)

    def _publish(self, save: _Save) -> bool:
        self._save = None
        try:
            digests = save.write.finish()
            on_main(lambda: self._publish_files(save.step, digests))
        except SaveFailed as error:
            return self._failed(save.step, str(error))
        self.longest = max(self.longest or 0.0, time.monotonic() - save.started)
        LOGGER.info(f"checkpoint {self.folder.final(save.step)}")
        self.keep_order()
        return True

    def _publish_files(self, step: int, digests: dict[str, list]) -> None:
        unfinished = self._unfinished(step)
        unseen = [name for name in digests if not (unfinished / name).is_file()]
        if unseen:
            raise OSError(f"{unseen[0]} was written by another rank into a folder that this one does not see")
        own = [path for path in unfinished.iterdir() if path.name not in digests]
        for path in self.folder.set_aside_after(step):
            LOGGER.info(
                f"{path.parent}: the checkpoint of a later step, from before the run was resumed, is now {path.name}"
            )
        self.folder.publish(step, digests | {path.name: digest(path) for path in own}, self._attempt)

    def _give_up(self, save: _Save) -> bool:
        self._save = None
        return self._failed(save.step, f"not written within {self.seconds:g} s")

    def _failed(self, step: int, problem: str) -> bool:
        if dist.get_rank() == 0:
            shutil.rmtree(self._unfinished(step), ignore_errors=True)
        LOGGER.warning(f"step {step}: the checkpoint could not be saved: {problem}; training continues")
        return False

"""Writing checkpoints in the background, without a process that could hang the run when it dies.

Megatron's writer starts processes and waits for them without a bound. Here each rank copies its share to host memory,
and a thread of its own writes the copy with Megatron's function. Once the threads of all ranks are done, the main
threads exchange what was written (a collective, at the end of a step) and publish the checkpoint.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_gkd.runtime.agreement import first_problem, holds_everywhere
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, digest

Bucket = tuple[str, str, tuple[list, list]]  # file, its name, (bytes, tensors) that it gets
_POLL_SECONDS = 0.02


@dataclass
class _Write:
    """One save under way, on this rank."""

    step: int
    request: AsyncRequest
    thread: threading.Thread
    digests: dict[str, list] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    error: BaseException | None = None


class Saver:
    """Saves a run's state, at most one step at a time. All ranks must make the same calls.

    Args:
        folder: where to.
        is_asynchronous: `save` returns once this rank's share is copied; else once the checkpoint is whole.
        most: checkpoints to keep; None: all.
        report: takes one line about each save, on every rank.
        seconds: that a save may take before it is given up.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        *,
        is_asynchronous: bool = True,
        most: int | None = None,
        report: Callable[[str], None] = lambda line: None,
        seconds: float = 1800.0,
    ):
        self.folder, self.is_asynchronous, self.most = folder, is_asynchronous, most
        self.report, self.seconds = report, seconds
        self.longest: float | None = None
        """Seconds of the longest save so far, from its snapshot to its publication."""
        self._write: _Write | None = None
        self._attempt = 0

    def save(self, step: int, state: dict[str, Any], run: dict[str, Any]) -> bool:
        """Save `state`, a sharded state dict, and `run`, plain values, as those of `step`.

        Waits for a save that is under way.

        Returns:
            False if it failed, which was reported: training can go on.
        """
        self.finish()
        self._attempt += 1
        problem = None
        if dist.get_rank() == 0:
            try:
                self.folder.prepare(step, run, self._attempt)
            except OSError as error:
                problem = str(error)
        problem = first_problem(problem)
        if problem is not None:
            return self._failed(step, problem)
        try:
            self._write = self._begin(step, state)
        except Exception as error:  # Megatron raises it on all ranks
            return self._failed(step, _one_line(error))
        return True if self.is_asynchronous else self.finish()

    def poll(self) -> None:
        """Publish the save under way if all ranks have written their share. At the end of each step."""
        if self._write is not None and holds_everywhere(not self._write.thread.is_alive()):
            self._publish(self._write)
        elif self._write is not None and not holds_everywhere(time.monotonic() - self._write.started < self.seconds):
            self._give_up(self._write)

    def finish(self) -> bool:
        """Wait for the save under way, at most as long as one may take. Returns False if it failed."""
        write = self._write
        if write is None:
            return True
        write.thread.join(max(0.0, write.started + self.seconds - time.monotonic()))
        if holds_everywhere(not write.thread.is_alive()):
            return self._publish(write)
        return self._give_up(write)

    def _unfinished(self, step: int) -> Path:
        return self.folder.unfinished(step, self._attempt)

    def _begin(self, step: int, state: dict[str, Any]) -> _Write:
        # Megatron's own queue belongs to a process that it would spawn for it.
        filesystem_async._results_queue = queue.SimpleQueue()
        request = dist_checkpointing.save(state, str(self._unfinished(step)), async_sharded_save=True)
        buckets, results = [], None
        if request.async_fn is not None:
            _, buckets, results = request.async_fn_args
            buckets = [_copy(bucket) for bucket in buckets]
        write = _Write(step, request, threading.Thread(name="checkpoint", daemon=True, target=lambda: None))
        write.thread = threading.Thread(
            name="checkpoint", daemon=True, target=partial(_write_share, write, buckets, results)
        )
        write.thread.start()
        return write

    def _publish(self, write: _Write) -> bool:
        self._write = None
        problem = first_problem(None if write.error is None else _one_line(write.error))
        if problem is not None:
            return self._failed(write.step, problem)
        try:
            for finalize in write.request.finalize_fns:
                finalize()
        except Exception as error:  # Megatron raises it on all ranks
            return self._failed(write.step, _one_line(error))
        digests: list[dict[str, list]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(digests, write.digests)
        if dist.get_rank() == 0:
            try:
                self._publish_files(write.step, {name: one for part in digests for name, one in part.items()})
            except OSError as error:
                problem = str(error)
        problem = first_problem(problem)
        if problem is not None:
            return self._failed(write.step, problem)
        self.longest = max(self.longest or 0.0, time.monotonic() - write.started)
        self.report(f"checkpoint {self.folder.final(write.step)}")
        return True

    def _publish_files(self, step: int, digests: dict[str, list]) -> None:
        own = [path for path in self._unfinished(step).iterdir() if path.name not in digests]
        self.folder.publish(step, digests | {path.name: digest(path) for path in own}, self._attempt)
        if self.most is not None:
            self.folder.forget_old(self.most)

    def _give_up(self, write: _Write) -> bool:
        self._write = None
        return self._failed(write.step, f"not written within {self.seconds:g} s")

    def _failed(self, step: int, problem: str) -> bool:
        if dist.get_rank() == 0:
            shutil.rmtree(self._unfinished(step), ignore_errors=True)
        self.report(f"warning: step {step}: the checkpoint could not be saved: {problem}; training goes on")
        return False


def _copy(bucket: Bucket) -> Bucket:
    """Return the bucket with copies of its tensors in host memory: the step after this one changes the originals."""
    file, name, (contents, tensors) = bucket
    return file, name, (contents, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])


def _write_share(write: _Write, buckets: list[Bucket], results: Any) -> None:
    try:
        found = {}
        transforms = write.request.async_fn.args[0] if buckets else []
        for index, bucket in enumerate(buckets):
            outcome, done = queue.SimpleQueue(), queue.Queue()
            done.put(index)
            filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, done, True)
            _, found[index] = outcome.get()
            if isinstance(found[index], Exception):
                raise found[index]
            path = Path(bucket[0])
            write.digests[path.name] = digest(path)
        if results is not None:
            results.put(found)
    except BaseException as error:
        write.error = error


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]

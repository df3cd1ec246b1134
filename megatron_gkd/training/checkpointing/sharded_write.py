"""One save of a sharded state dict with Megatron's writer, in phases that all ranks complete or fail together.

``dist_checkpointing.save`` raises an error on the rank that has it, while the others wait for that rank in the next
collective (``docs/upstream_defects.md``). Here a phase has no collective after the work that can fail, and a failure
on one rank is raised on all of them. Nothing here starts a process.
"""

from __future__ import annotations

import io
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.errors import GkdError
from megatron_gkd.runtime.agreement import run_on_all
from megatron_gkd.runtime.current_phase import note_progress
from megatron_gkd.training.checkpointing.folder import digest

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity

T = TypeVar("T")
Bucket = tuple[str, str, tuple[list, list]]  # file, its name, (bytes, tensors) that it gets


class SaveFailed(GkdError):
    """A save failed on some rank. All ranks raise it together, with a message of one line."""


def on_all(work: Callable[[], T]) -> T:
    """Run `work` on this rank and return its result. All ranks must call it; collectives may only begin the work.

    Raises:
        SaveFailed: in all ranks, if the work of any rank failed.
    """

    def attempt() -> T:
        try:
            return work()
        except (Exception, CheckpointException) as error:  # torch's is a BaseException
            raise SaveFailed(one_line(error)) from error

    return run_on_all(attempt, SaveFailed)


def on_main(work: Callable[[], T]) -> T | None:
    """Run `work` on the main rank; see `on_all`. The others return None."""
    return on_all(lambda: work() if dist.get_rank() == 0 else None)


class ShardedWrite:
    """Write this rank's share of `state` into `folder`, in a thread that gets copies of the tensors.

    All ranks must make the same calls: `finish` once `is_alive` is false everywhere.

    Args:
        state: a sharded state dict, which is changed; see `state.StateToWrite`.
        folder: an existing folder that all ranks see.

    Raises:
        SaveFailed: in all ranks.
    """

    def __init__(self, state: dict[str, Any], folder: Path) -> None:
        self.folder = folder
        self._digests: dict[str, list] = {}
        self._results: list = []
        self._error: BaseException | None = None
        self._storages: frozenset[int] = getattr(state, "storages", frozenset())
        sharded, common = on_all(lambda: save_preprocess(state, validate_access_integrity=False))
        shards = on_all(lambda: determine_global_metadata(sharded)[1])
        on_all(lambda: validate_sharding_integrity(shards))
        on_main(lambda: self._write_common(common))
        self._writer = FileSystemWriterAsync(str(folder), thread_count=2)
        self._metadata, self._buckets = self._plan(sharded)
        self._thread = threading.Thread(name="checkpoint", daemon=True, target=self._run)
        on_all(self._thread.start)

    def is_alive(self) -> bool:
        """Return whether this rank is still writing."""
        return self._thread.is_alive()

    def join(self, seconds: float) -> None:
        """Wait for this rank's thread for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            note_progress()  # the wait has a limit of its own
            self._thread.join(min(1.0, left))

    def finish(self) -> dict[str, list]:
        """Write the metadata, when all ranks have written. Return [bytes, SHA-256] of the shards, by name.

        Raises:
            SaveFailed: in all ranks.
        """
        on_all(self._raise_error)
        found = _gather((self._results, self._digests))
        on_main(lambda: self._write_metadata([results for results, _ in found]))
        return {name: one for _, digests in found for name, one in digests.items()}

    def _write_common(self, common: dict[str, Any]) -> None:
        with (self.folder / COMMON_STATE_FNAME).open("wb") as file:
            torch.save(common, file)

    def _plan(self, sharded: dict[str, Any]) -> tuple[Metadata | None, list[Bucket]]:
        """Return the content of ``.metadata``, on the main rank, and the files that this rank writes."""
        planner = _SnapshotPlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.storages = self._storages
        is_main = dist.get_rank() == 0

        def plan_share() -> SavePlan:
            main_replicas, *_ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
            planner.set_up_planner(mcore_to_pyt_state_dict(main_replicas), is_coordinator=is_main)
            self._writer.set_up_storage_writer(is_main)
            return self._writer.prepare_local_plan(planner.create_local_plan())

        share = on_all(plan_share)
        shares = _gather(share)
        metadata = on_main(lambda: planner.create_global_plan(shares)[1])

        def fill_buckets() -> list[Bucket]:
            plan = planner.create_decentralized_global_plan(share)
            plan = planner.finish_plan(self._writer.prepare_decentralized_global_plan(plan))
            # Megatron's own queue belongs to a process that it would spawn for it.
            filesystem_async._results_queue = queue.SimpleQueue()
            self._writer.prepare_write_data(plan, planner)
            return self._writer.write_buckets

        return metadata, on_all(fill_buckets)

    def _run(self) -> None:
        try:
            for index, bucket in enumerate(self._buckets):
                outcome: queue.SimpleQueue[tuple[int, list | Exception]] = queue.SimpleQueue()
                done: queue.Queue[int] = queue.Queue()
                done.put(index)
                FileSystemWriterAsync.write_preloaded_data(
                    [self._writer.transforms], index, bucket, outcome, done, True
                )
                _, results = outcome.get()
                if isinstance(results, Exception):
                    raise results
                self._results += results
                self._digests[bucket[1]] = digest(Path(bucket[0]))
                note_progress()
        except BaseException as error:
            self._error = error
        finally:
            self._buckets = self._writer.write_buckets = []  # the copies

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_metadata(self, results: list[list]) -> None:
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


class _SnapshotPlanner(MCoreSavePlanner):
    """Give the writer copies in host memory: the next step changes the tensors themselves.

    Attributes:
        storages: addresses of tensors that are copies already.
    """

    storages: frozenset[int] = frozenset()

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return a copy of the data of `write_item`."""
        data = super().resolve_data(write_item)
        if not isinstance(data, torch.Tensor):
            return data
        data = data.detach()
        return data if data.untyped_storage().data_ptr() in self.storages else data.to("cpu", copy=True)


def _gather(value: T) -> list[T]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def one_line(error: BaseException) -> str:
    """Return the last line of the first cause of `error`, or its type's name where it has no text."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]

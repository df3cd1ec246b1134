"""The watchdog of a command's ranks, and the end of a process in which another rank hangs or has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import GkdError
from megatron_gkd.launch.failures import report_failure
from megatron_gkd.runtime.signals import leave_process
from megatron_gkd.runtime.watchdog.board import Board
from megatron_gkd.runtime.watchdog.report import End, EndKind
from megatron_gkd.runtime.watchdog.watchdog import Limits, Watchdog

RecordEnd = Callable[[int, str], None]
"""Records an exit code and its reason for the whole run."""


def start_watchdog(recipe: Recipe, record_end: RecordEnd) -> Watchdog:
    """Start this rank's watchdog. All ranks must call it, once their process group exists."""
    folder = Path(recipe.output.output_dir) / "hangs"
    continues = recipe.output.save_interval is not None

    def leave(end: End, is_recorder: bool) -> None:
        message = end.message
        if end.kind is EndKind.HANG:
            last = "the same command continues the run from its last checkpoint" if continues else "nothing is saved"
            message = f"{end.message}; Python stacks are in {folder / f'step-{end.step}'}; {last}"
        if is_recorder:
            record_end(end.code, message)
        if end.kind is EndKind.HANG:
            report_failure(message, None, end.code, is_shared=0 in end.responding, kind="hang")
        else:
            report_failure(message, None, end.code, kind="consequence")
        leave_process(end.code)

    rank, limits = dist.get_rank(), Limits(recipe.cluster.watchdog_s)
    watchdog = Watchdog(Board.connect(dist.get_world_size()), rank, limits, folder, leave)
    watchdog.start()
    return watchdog


@contextlib.contextmanager
def announced(watchdog: Watchdog) -> Iterator[None]:
    """Announce an exception inside to the other ranks, unless they raise it, too."""
    try:
        yield
    except Exception as error:
        if not (isinstance(error, GkdError) and error.is_shared):
            code = error.exit_code if isinstance(error, GkdError) else 1
            reason = str(error) if isinstance(error, GkdError) else f"{type(error).__name__}: {error}"
            watchdog.announce_failure(f"rank {dist.get_rank()} has failed: {reason}".partition("\n")[0], code)
        raise

"""What a process that hangs can show of itself: the stacks of its threads, and torch's record of collectives."""

from __future__ import annotations

import contextlib
import linecache
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from torch._C import _distributed_c10d

from megatron_gkd.runtime.current_phase import current_mark, seconds_without_progress

_WAITING_FILES = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication.py")
_WAITING_FUNCTIONS = (("megatron_gkd/runtime/nodes.py", "_wait"), ("megatron_gkd/runtime/agreement.py", "join"))
_DEPTH = 3  # innermost frames that are looked at
_IS_RENAMED = hasattr(_distributed_c10d, "_dump_fr_trace")  # torch warns of the older names of its variables


def recording_variables(folder: Path) -> dict[str, str]:
    """Return the environment variables that make torch record collectives, and NCCL write them at its own time-outs."""
    return {
        "TORCH_FR_BUFFER_SIZE" if _IS_RENAMED else "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
        "TORCH_FR_DUMP_TEMP_FILE" if _IS_RENAMED else "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(
            folder / "nccl_trace_rank_"  # torch adds the rank
        ),
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
    }


def enable_recording(folder: Path) -> None:
    """Let torch record collectives, and NCCL write them to `folder`. To be called before a process group exists.

    Variables that the user has set stay.
    """
    for name, value in recording_variables(folder).items():
        os.environ.setdefault(name, value)


def is_waiting_for_others() -> bool:
    """Return whether the main thread is in a collective or another wait for ranks, as its stack shows.

    A process that waits for its device, for NCCL's collectives, does not show it in this way.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    for _ in range(_DEPTH):
        if frame is None:
            return False
        if _is_wait(frame):
            return True
        frame = frame.f_back
    return False


def _is_wait(frame: FrameType) -> bool:
    file = frame.f_code.co_filename.replace(os.sep, "/")
    if any(part in file for part in _WAITING_FILES):
        return True
    if any(file.endswith(name) and frame.f_code.co_name == function for name, function in _WAITING_FUNCTIONS):
        return True
    return "megatron/core/" in file and ".wait(" in linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def newest_collectives() -> dict[str, int] | None:
    """Return the number of the newest collective of each process group; None where torch has no record."""
    with contextlib.suppress(Exception):  # private functions, whose format may change
        entries = pickle.loads(_dump(stacks=False)).get("entries", ())
        newest: dict[str, int] = {}
        for entry in entries:
            if not entry["is_p2p"]:
                group = str(entry["process_group"][0])
                newest[group] = max(newest.get(group, 0), int(entry["collective_seq_id"]))
        return newest or None
    return None


def write_evidence(folder: Path, rank: int, header: str) -> None:
    """Write the stacks of all threads to `rank-R.txt`, and torch's record of collectives, if any, to `collectives-R`.

    `torchfrtrace FOLDER --prefix collectives-` reads the latter.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank-{rank}.txt").write_text(_format_stacks(header), encoding="utf-8")
    with contextlib.suppress(Exception):
        (folder / f"collectives-{rank}").write_bytes(_dump(stacks=True))


def _dump(*, stacks: bool) -> bytes:
    """Return torch's record of collectives as a pickle: NCCL's where there is one, or else gloo's."""
    name = "_dump_nccl_trace" if hasattr(_distributed_c10d, "_dump_nccl_trace") else "_dump_fr_trace"
    dump: Callable[..., bytes] = getattr(_distributed_c10d, name)
    return dump(includeCollectives=True, includeStackTraces=stacks, onlyActive=False)


def _format_stacks(header: str) -> str:
    mark, now = current_mark(), time.strftime("%Y-%m-%d %H:%M:%S")
    parts = [
        f"{header}\n{now}: process {os.getpid()}, phase {mark.phase}, step {mark.step}, no progress for "
        f"{seconds_without_progress():.0f} s\n"
    ]
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sys._current_frames()
    for ident in sorted(frames, key=lambda one: one != main):
        stack = "".join(traceback.format_stack(frames[ident]))
        parts.append(f"thread {names.get(ident, ident)}:\n{stack}")
    return "\n".join(parts)

"""Report why a rank fails: in a file for our launcher, which prints it, or printed here under another launcher."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_gkd.launch import claims, environment
from megatron_gkd.runtime.disk import replace_text

FOLDER = "MEGATRON_GKD_FAILURES"
"""The environment variable with the folder where our launcher reads its ranks' failures."""
LAUNCHER = "MEGATRON_GKD_LAUNCHER_PID"
"""The environment variable with the process id of our launcher."""

_FIRST_NODE_ENDS_WITHIN_S = 8.0

FailureKind = Literal["failure", "consequence", "hang"]
"""A failure of its own; the end of a rank since another one has failed; the end of a rank since the run hangs."""


@dataclass(frozen=True)
class Failure:
    """Why a rank ended.

    Attributes:
        message: for the user; of an unexpected exception its type and text.
        traceback: of an unexpected exception.
        code: the rank's exit code.
        is_shared: whether all ranks fail for this reason, so that the message names none of them.
        time: seconds since the epoch.
        kind: of the failure.
    """

    message: str
    traceback: str | None
    code: int
    is_shared: bool
    time: float
    kind: FailureKind = "failure"


def report_failure(
    message: str,
    traceback_text: str | None,
    code: int,
    *,
    is_shared: bool = False,
    kind: FailureKind = "failure",
) -> None:
    """Report why this process ends, which it must do next.

    Args:
        message: for the user.
        traceback_text: of an unexpected exception; None for an expected failure.
        code: the exit code that follows.
        is_shared: whether every rank of the run reports this message.
        kind: of the failure. A consequence is for our launcher alone: the rank with the cause prints that.
    """
    folder = os.environ.get(FOLDER)
    if folder is not None:
        failure = Failure(message, traceback_text, code, is_shared, time.time(), kind)
        with contextlib.suppress(OSError):
            replace_text(_file(Path(folder), environment.rank()), json.dumps(asdict(failure)))
            return
    if kind != "consequence":
        _print(traceback_text.rstrip() if traceback_text else message, is_shared=is_shared)


def read_failure(folder: Path, rank: int) -> Failure | None:
    """Return what `rank` has reported in the launcher's folder; None if it ended without a report."""
    try:
        return Failure(**json.loads(_file(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def end_with_launcher() -> None:
    """Let the kernel end this process when the launcher that started it ends. Does nothing without our launcher."""
    launcher = os.environ.pop(LAUNCHER, None)  # not for the processes that this one starts
    if launcher is None:
        return
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != int(launcher):  # it ended before
        os._exit(1)


def _print(message: str, *, is_shared: bool) -> None:
    rank, of_torchrun = environment.rank(), "TORCHELASTIC_RUN_ID" in os.environ
    if is_shared and not of_torchrun and rank != 0:
        return
    if is_shared and of_torchrun and os.environ.get("GROUP_RANK", "0") != "0" and _has_first_node_ended(os.environ):
        return  # its ranks have printed it
    claims.print_once(message, prefix="" if is_shared or rank == 0 else f"rank {rank}: ")


def _has_first_node_ended(variables: Mapping[str, str]) -> bool:
    """Wait for the first node's torchrun to end, as it does after a failure that the nodes share.

    Returns:
        Whether it has ended. It listens at MASTER_PORT as long as it lives.
    """
    deadline = time.monotonic() + _FIRST_NODE_ENDS_WITHIN_S
    while time.monotonic() < deadline:
        if variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            try:
                socket.create_connection((variables["MASTER_ADDR"], int(variables["MASTER_PORT"])), timeout=1).close()
            except ConnectionRefusedError:
                return True
            except (OSError, KeyError):
                pass  # the message is printed where this cannot be known
        time.sleep(0.2)
    return False


def _file(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"

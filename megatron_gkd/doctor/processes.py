"""Run Python in processes of their own, which may crash or hang without an effect on the report."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_READ_SECONDS = 5.0
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_running: set[subprocess.Popen[str]] = set()


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Attributes:
        code: its exit code; None if it was killed after its time.
        stdout: what it printed.
        stderr: what it printed there.
    """

    code: int | None
    stdout: str
    stderr: str

    @property
    def problem(self) -> str:
        """Why it failed, on one line: its last line on stderr, or how it ended."""
        if self.code is None:
            return "it did not end in time"
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        ended = f"signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        return lines[-1][:300] if lines else ended


def run_python(arguments: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run `python ARGUMENTS` for at most `seconds`."""
    return run_together([arguments], seconds, environment)[0]


def run_together(
    commands: Sequence[Sequence[str]], seconds: float, environment: Mapping[str, str] | None = None
) -> list[Outcome]:
    """Run `python ARGUMENTS` for each of `commands` at the same time; all of them end within `seconds`.

    Args:
        commands: the arguments of each process.
        seconds: the time for all of them together.
        environment: variables beside those of this process.
    """
    outside = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=outside | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | dict(environment or {}),
            start_new_session=True,
        )
        for arguments in commands
    ]
    _running.update(processes)
    deadline = time.monotonic() + seconds
    try:
        return [_wait(process, deadline) for process in processes]
    finally:
        for process in processes:
            _kill(process)
        _running.difference_update(processes)


def _wait(process: subprocess.Popen[str], deadline: float) -> Outcome:
    remaining = deadline - time.monotonic()
    least = 0.0 if process.poll() is None else _READ_SECONDS  # one that has ended in time is read later
    try:
        stdout, stderr = process.communicate(timeout=max(least, remaining))
        return Outcome(process.returncode, stdout, stderr)
    except subprocess.TimeoutExpired:
        _kill(process)
        return Outcome(None, "", "")


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill the process with those that it has started, and close what it printed."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it may wait for a device that does not respond
            process.wait(_READ_SECONDS)
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


@atexit.register
def _kill_running() -> None:
    """Kill what a check's thread still waits for when the report is interrupted: it is in a session of its own."""
    for process in tuple(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

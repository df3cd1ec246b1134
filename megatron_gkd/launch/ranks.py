"""The processes of the ranks on this node."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from typing import Self


class Ranks:
    """Started processes by local rank, each the leader of a session of its own, so that Ctrl-C does not reach them.

    A process that ends stays a zombie until `close`: its id, which is its group's too, is not reused.

    Attributes:
        codes: exit codes of the ranks that have ended; minus the number of the signal that killed one.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._processes = list(processes)
        self.codes: dict[int, int] = {}

    @classmethod
    def start(cls, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Self:
        """Start `command` once for each of `environments`."""
        ranks = cls([])
        for variables in environments:
            process = subprocess.Popen(
                command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, start_new_session=True
            )
            ranks._processes.append(process)
        return ranks

    @property
    def pids(self) -> list[int]:
        """Process ids by local rank."""
        return [process.pid for process in self._processes]

    @property
    def running(self) -> list[int]:
        """Local ranks that had not ended at the last `poll`."""
        return [rank for rank in range(len(self._processes)) if rank not in self.codes]

    def poll(self) -> list[int]:
        """Return the local ranks that have ended since the last call."""
        ended = []
        for rank in self.running:
            state = os.waitid(os.P_PID, self.pids[rank], os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if state is not None:
                self.codes[rank] = state.si_status if state.si_code == os.CLD_EXITED else -state.si_status
                ended.append(rank)
        return ended

    def send(self, signum: int) -> None:
        """Send a signal to every running rank, but not to the processes that it has started."""
        for rank in self.running:
            os.kill(self.pids[rank], signum)

    def kill(self) -> None:
        """Kill every rank with the processes of its process group."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill every rank that is left, and wait for it."""
        self.kill()
        for rank, process in enumerate(self._processes):
            if process.returncode is None:
                process.wait()
            self.codes.setdefault(rank, process.returncode)
        self._processes = []

"""When the launcher ends ranks that outlive a failure or a signal."""

from __future__ import annotations

import signal
import time

from megatron_gkd.launch.ranks import Ranks
from megatron_gkd.launch.report import End, Stop

ENDS_BY_ITSELF_S = 10.0  # ranks that fail together do so within this time of each other, with their messages
ENDS_AFTER_A_KILL_S = 2.0  # the same, where a rank was killed: the others can only lose their connections
ENDS_AFTER_SIGTERM_S = 10.0
ENDS_AFTER_A_HANG_S = 5.0  # then SIGKILL: a process that is stopped receives nothing else


class Deadlines:
    """Send SIGTERM and SIGKILL to ranks that still run after a rank has failed or the launcher has received a signal.

    Attributes:
        stopped: why ranks that end now do so; None as long as no signal was sent here.
    """

    def __init__(self, shutdown_timeout: float) -> None:
        self._shutdown_timeout = shutdown_timeout
        self._terminate_at = self._kill_at = float("inf")
        self._is_terminated = False
        self.stopped: Stop | None = None

    def on_end(self, end: End) -> None:
        """Note the end of a rank."""
        if end.code == 0:
            return
        if end.is_hang:
            self.on_hang()
        elif end.is_interruption:
            self.on_signal()
        else:
            self.on_failure(ENDS_AFTER_A_KILL_S if end.code < 0 else ENDS_BY_ITSELF_S)

    def on_signal(self) -> None:
        """Note a signal to end: the ranks have the shutdown time-out to save."""
        self._kill_at = min(self._kill_at, time.monotonic() + self._shutdown_timeout)

    def on_failure(self, seconds: float) -> None:
        """Note a failure; the other ranks have `seconds` to end by themselves."""
        self._terminate_at = min(self._terminate_at, time.monotonic() + seconds)

    def on_hang(self) -> None:
        """Note that the run hangs: ranks that respond end together, and the others not at all."""
        self.on_failure(ENDS_AFTER_A_KILL_S)
        self._kill_at = min(self._kill_at, time.monotonic() + ENDS_AFTER_A_HANG_S)

    def act(self, ranks: Ranks) -> None:
        """Send the signals that are due."""
        now = time.monotonic()
        if now >= self._terminate_at and not self._is_terminated:
            self._is_terminated, self.stopped = True, Stop.FAILURE_ELSEWHERE
            self._kill_at = min(self._kill_at, now + ENDS_AFTER_SIGTERM_S)
            ranks.send(signal.SIGTERM)
        if now >= self._kill_at:
            self.stopped = self.stopped or Stop.TIMEOUT
            ranks.kill()

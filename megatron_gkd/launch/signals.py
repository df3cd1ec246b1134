"""The signals that a launcher forwards to its ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by nohup, or a shell that starts a process with &


class SignalHandlers:
    """Call `handle(signum)` for the signals of FORWARDED between `install` and `restore`."""

    def __init__(self, handle: Callable[[int], None]) -> None:
        self._handle = handle
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Replace the handlers, except of signals that this process ignores."""
        for signum in FORWARDED:
            if signum in self._before:
                continue
            if signum in _MAY_BE_IGNORED and signal.getsignal(signum) is signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, lambda number, _: self._handle(number))

    def restore(self) -> None:
        """Set the former handlers again."""
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler)

"""The signals that a launcher hands on to its ranks."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

HANDED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_MAY_BE_IGNORED = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by nohup, or a shell that starts a process with &


class SignalHandlers:
    """Let `handle(signum)` answer the signals of HANDED_ON between `install` and `restore`."""

    def __init__(self, handle: Callable[[int], None]) -> None:
        self._handle = handle
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        for signum in HANDED_ON:
            if signum in self._before:
                continue
            if signum in _MAY_BE_IGNORED and signal.getsignal(signum) is signal.SIG_IGN:
                continue
            self._before[signum] = signal.signal(signum, lambda number, _: self._handle(number))

    def restore(self) -> None:
        while self._before:
            signum, handler = self._before.popitem()
            signal.signal(signum, handler)

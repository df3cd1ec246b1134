"""Receive the signals that end a run: SIGTERM, SIGUSR1, SIGINT, and SIGHUP of a terminal that closes.

A Python signal handler runs in the main thread between two bytecodes, which a rank that waits in a collective or reads
a large file does not reach. Here a thread reads the signals' numbers from the pipe that the interpreter's own handler
writes them to at once (`signal.set_wakeup_fd`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
SAME_KEYSTROKE_S = 0.5  # a launcher and the terminal may both deliver one Ctrl-C
_CLOSE = 0  # no signal has this number


class StopSignals:
    """Receive the signals that end this process. A context manager; only the main thread may enter it.

    Until `defer` is called, the first signal ends the process at once. From then on it is noted in `received`, for the
    training loop to act on at the end of its step; a second SIGINT still ends the process at once.

    Args:
        leave: ends the process; called from a thread with the signal's name, and whether it is the second SIGINT.

    Attributes:
        received: the name of the first signal; None before.
    """

    def __init__(self, leave: Callable[[str, bool], None]) -> None:
        self._leave = leave
        self._is_deferred = False
        self._first_interrupt: float | None = None
        self._previous: dict[int, Any] = {}  # handlers, as `signal.signal` returns them
        self._lock = threading.Lock()
        self.received: str | None = None

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("StopSignals can only be entered by the main thread")
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup, or by a shell for jobs in the background
                self._previous[number] = signal.signal(number, _ignore)
        self._thread = threading.Thread(target=self._read, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: not installed from Python, which cannot put it back
                signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._writer, bytes([_CLOSE]))
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def defer(self) -> None:
        """Note further signals in `received`, instead of ending the process."""
        with self._lock:
            self._is_deferred = True

    def _read(self) -> None:
        while True:
            for number in os.read(self._reader, 64):
                if number == _CLOSE:
                    return
                if number in self._previous:
                    self._handle(signal.Signals(number))

    def _handle(self, number: signal.Signals) -> None:
        now = time.monotonic()
        with self._lock:
            is_second = number == signal.SIGINT and self._is_repeated(now)
            is_first, self.received = self.received is None, self.received or number.name
            acts_now = is_second or (is_first and not self._is_deferred)
        if acts_now:
            self._leave(number.name, is_second)

    def _is_repeated(self, now: float) -> bool:
        """Return whether this SIGINT is a second one, and note the time of the first."""
        if self._first_interrupt is None:
            self._first_interrupt = now
        return now - self._first_interrupt >= SAME_KEYSTROKE_S


def _ignore(number: int, frame: object) -> None:
    """Do nothing: a handler has to be installed for the signal's number to reach the pipe."""


def leave_process(code: int) -> None:
    """End this process at once: destroying its process groups would wait for other ranks."""
    for child in multiprocessing.active_children():
        child.kill()  # a loader's worker ignores SIGTERM
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

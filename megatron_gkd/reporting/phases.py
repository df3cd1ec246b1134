"""The phases of a run's start: a line for each that takes long, with its progress and its duration.

On a terminal (stderr, else stdout) a phase that counts something is a bar, which its last line replaces. Elsewhere
there are lines on stdout alone, at most one in `LINE_EVERY_S`.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from megatron_gkd.reporting.numbers import format_rate, format_seconds

ANNOUNCE_AFTER_S = 1.0  # a phase that ends sooner prints no line
LINE_EVERY_S = 10.0
_DRAW_EVERY_S = 0.1

# Processes that tokenize are forked while a timer may print: a copy of a stream that is locked would never be free.
_printing = threading.RLock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_printing.acquire, after_in_parent=_printing.release, after_in_child=_printing.release)


class Phase:
    """Show nothing: a phase on a rank that is not the main one."""

    def update(self, done: int, total: int | None = None) -> None:
        """Show that `done` of `total` units are done. Those of the first call do not count in the rate."""

    def start(self) -> None:
        """Start to show the phase."""

    def stop(self, *, is_complete: bool) -> None:
        """Stop to show the phase. `is_complete`: it raised nothing."""


@contextlib.contextmanager
def phase(title: str, *, is_main: bool, unit: str | None = None) -> Iterator[Phase]:
    """Show what runs inside the context as a phase.

    Args:
        title: the action and its object: `Loading the student Qwen/Qwen3-1.7B`.
        is_main: whether this is the rank that prints.
        unit: what `Phase.update` counts, in the plural; None where it is not called.
    """
    shown = _visible(title, unit) if is_main else Phase()
    shown.start()
    try:
        yield shown
    except BaseException:
        shown.stop(is_complete=False)
        raise
    shown.stop(is_complete=True)


def _visible(title: str, unit: str | None) -> Phase:
    terminal = next((stream for stream in (sys.stderr, sys.stdout) if stream.isatty()), None)
    if terminal is not None and unit is not None:
        return _BarPhase(title, unit, terminal)
    return _LinePhase(title, unit or "", terminal or sys.stdout)


class _VisiblePhase(Phase):
    """Count the units of a phase, time it, and describe both."""

    def __init__(self, title: str, unit: str, stream: TextIO) -> None:
        self._title, self._unit, self._stream = title, unit, stream
        self._begin = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and count of the first update
        self._done = 0
        self._total: int | None = None

    def update(self, done: int, total: int | None = None) -> None:
        self._done, self._total = done, total
        self._first = self._first or (time.monotonic(), done)

    def _print(self, text: str) -> None:
        with _printing:
            print(text, file=self._stream, flush=True)

    def _print_end(self) -> None:
        seconds = format_seconds(time.monotonic() - self._begin)
        if self._first is None:
            self._print(f"{self._title}: done in {seconds}")
        else:
            self._print(f"{self._title}: {self._done} {self._unit} in {seconds}{self._rate()}")

    def _progress(self) -> str:
        total = "" if self._total is None else f" of {self._total}"
        return f"{self._done}{total} {self._unit}{self._rate()}"

    def _rate(self) -> str:
        """Return the rate in brackets, or an empty text where there is none yet."""
        begin, done = self._first or (self._begin, 0)
        seconds = time.monotonic() - begin
        if self._done == done or seconds <= 0:
            return ""
        return f" ({format_rate((self._done - done) / seconds, self._unit)})"


class _LinePhase(_VisiblePhase):
    """Print a line when the phase has taken a while, its progress at intervals, and its end."""

    def __init__(self, title: str, unit: str, stream: TextIO) -> None:
        super().__init__(title, unit, stream)
        self._last_line = self._begin
        self._timer = threading.Timer(ANNOUNCE_AFTER_S, self._announce)
        self._timer.daemon = True
        self._is_over = False

    def start(self) -> None:
        self._timer.start()

    def update(self, done: int, total: int | None = None) -> None:
        super().update(done, total)
        if time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._print(f"{self._title}: {self._progress()}")

    def stop(self, *, is_complete: bool) -> None:
        with _printing:
            self._is_over = True
        self._timer.cancel()
        if is_complete and time.monotonic() - self._begin >= ANNOUNCE_AFTER_S:
            self._print_end()

    def _announce(self) -> None:
        with _printing:
            if not self._is_over:
                self._print(f"{self._title} ...")


class _BarPhase(_VisiblePhase):
    """Draw a bar on a terminal, from this thread alone: no process that is forked meanwhile inherits a lock of it."""

    def __init__(self, title: str, unit: str, stream: TextIO) -> None:
        super().__init__(title, unit, stream)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[progress]}", markup=False),
            TimeElapsedColumn(),
            console=Console(file=stream),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task(title, total=None, progress="")
        self._drawn = self._begin

    def start(self) -> None:
        self._bar.start()
        self._bar.refresh()

    def update(self, done: int, total: int | None = None) -> None:
        super().update(done, total)
        now = time.monotonic()
        if now - self._drawn >= _DRAW_EVERY_S or done == total:
            self._drawn = now
            self._bar.update(self._task, completed=done, total=total, progress=self._progress(), refresh=True)

    def stop(self, *, is_complete: bool) -> None:
        self._bar.stop()
        if is_complete and time.monotonic() - self._begin >= ANNOUNCE_AFTER_S:
            self._print_end()

"""Mark what this process works on: the phase, the step, and when it has last made progress.

A mark is a few assignments, without a lock or communication: the watchdog's thread reads it (`runtime.watchdog`). The
phases are the spans of a profile, too (`gkd/NAME`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from torch.profiler import record_function

T = TypeVar("T")
_END = object()


@dataclass(frozen=True)
class PhaseMark:
    """What a process works on.

    Attributes:
        phase: the name of the phase.
        step: the step that it belongs to; 0 before the first.
        changes: how often the phase has changed. Ranks go through the same phases, so a smaller number is further back.
        is_limited: whether the phase must make progress; work that others limit need not.
        is_ending: whether the process ends by itself, after an error.
    """

    phase: str
    step: int = 0
    changes: int = 0
    is_limited: bool = True
    is_ending: bool = False


class _Current:
    """The mark of this process, and the time of its last progress."""

    def __init__(self) -> None:
        self.mark = PhaseMark("start")
        self.progress_at = time.monotonic()

    def replace(self, mark: PhaseMark) -> None:
        self.mark, self.progress_at = mark, time.monotonic()


_current = _Current()


def current_mark() -> PhaseMark:
    """Return what the main thread works on."""
    return _current.mark


def seconds_without_progress() -> float:
    """Return the seconds since the last progress, of any thread."""
    return time.monotonic() - _current.progress_at


def note_progress() -> None:
    """Note that the phase goes on: a microbatch, a response or a file is done. Any thread may call it."""
    _current.progress_at = time.monotonic()


def note_each(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`; each one is progress."""
    for item in items:
        note_progress()
        yield item


def begin_step(step: int) -> None:
    """Note the step that the next phases belong to."""
    mark = _current.mark
    _current.replace(PhaseMark(mark.phase, step, mark.changes, mark.is_limited, mark.is_ending))


@contextlib.contextmanager
def in_phase(name: str, *, is_limited: bool = True, is_ending: bool = False) -> Iterator[None]:
    """Mark what runs inside as the phase `name`, also in a profile. Of the main thread, on all ranks.

    Args:
        name: of the phase.
        is_limited: whether the watchdog requires progress.
        is_ending: whether the process ends by itself.
    """
    outside = _current.mark
    _current.replace(PhaseMark(name, outside.step, outside.changes + 1, is_limited, outside.is_ending or is_ending))
    try:
        with record_function(f"gkd/{name}"):
            yield
    finally:
        inside = _current.mark
        _current.replace(
            PhaseMark(outside.phase, inside.step, inside.changes + 1, outside.is_limited, outside.is_ending)
        )


def iterate_in_phase(name: str, items: Iterable[T], first_step: int) -> Iterator[T]:
    """Yield `items`, one for each step from `first_step`; the wait for each is the phase `name` of its step."""
    iterator, step = iter(items), first_step
    while True:
        begin_step(step)
        with in_phase(name):
            item = next(iterator, _END)
        if item is _END:
            return
        yield item  # type: ignore[misc]  # _END is none of the items
        step += 1

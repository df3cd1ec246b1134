"""What is done to the ranks of a run: SIGKILL at a chosen point, and steps whose loss is not finite.

Functions of the package are wrapped by their names before the command line runs. A name that is not there any more is
an error, and fails the launch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.points import Kill

Wrapped = Callable[[Callable, tuple, dict], Any]


@dataclass(frozen=True)
class Injection:
    """Done to every rank of one launch.

    Attributes:
        kill: None: no rank is killed.
        marker: the file that a rank writes just before it is killed, with where it was.
        seconds: that the launch is expected to take until the kill's target, for kills by time.
        bad_steps: steps whose loss is made NaN, counted from 1.
    """

    kill: Kill | None = None
    marker: Path | None = None
    seconds: float = 0.0
    bad_steps: frozenset[int] = frozenset()

    def install(self, rank: int) -> None:
        progress = _Progress()
        if self.bad_steps:
            _wrap("megatron_gkd.training.student:Student.compute_gradients", _spoil(progress, self.bad_steps))
        if self.kill is not None and rank == self.kill.rank:
            _Killer(self.kill, self.marker, progress).install(self.seconds)


class _Progress:
    """The step that a rank is in, counted from 1; 0 before the first."""

    def __init__(self):
        self.step = 0
        _wrap("megatron_gkd.training.trainer:Trainer.train_step", self._observe)

    def _observe(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        self.step = args[1]
        return function(*args, **kwargs)


class _Killer:
    """Kills the process, or all of its session, at the point of `kill`."""

    def __init__(self, kill: Kill, marker: Path, progress: _Progress):
        self.kill, self.marker, self.progress = kill, marker, progress
        self._calls, self._is_inside = 0, False
        self._seconds = kill.point.seconds  # then the last call's

    def install(self, seconds: float) -> None:
        if self.kill.point.moment == "time":
            self._die_after(self.kill.share * seconds)
        else:
            _wrap(self.kill.point.target, self._call)

    def _call(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        if not self._is_here(args):
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self._seconds = time.perf_counter() - start
            return result
        moment = self.kill.point.moment
        if moment == "before":
            self._die()
        if moment in _TORN:
            _TORN[moment](self, *args, **kwargs)
        if moment == "inside":
            self._is_inside = True
            self._die_after(self.kill.share * self._seconds)
        result = function(*args, **kwargs)
        self._is_inside = False
        if moment == "after":
            self._die()
        return result

    def _is_here(self, args: tuple) -> bool:
        point = self.kill.point
        if self.progress.step < self.kill.step or (point.only and point.only not in str(args[0])):
            return False
        if point.moment == "half removed" and not Path(args[0]).is_dir():
            return False
        self._calls += 1
        return self._calls == self.kill.call

    def _die_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._die)
        timer.daemon = True
        timer.start()

    def _die(self) -> None:
        where = {"pid": os.getpid(), "step": self.progress.step, "is_inside": self._is_inside}
        self.marker.write_text(json.dumps(where))
        if self.kill.is_everyone:
            os.killpg(os.getpgid(0), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def half_record(self, log: Any, *args: Any, **kwargs: Any) -> None:
        """Have the log's file die in the middle of what is written next."""
        log._file = _TornFile(log._file, self.kill.share, self._die)

    def half_text(self, path: Path, text: str, *args: Any, **kwargs: Any) -> None:
        with path.open("w", encoding="utf-8") as file:
            file.write(text[: int(self.kill.share * len(text))])
        self._die()

    def half_removed(self, path: Path, *args: Any, **kwargs: Any) -> None:
        names = sorted(Path(path).iterdir())
        for one in names[: int(self.kill.share * len(names))]:
            one.unlink() if one.is_file() else shutil.rmtree(one)
        self._die()


_TORN = {"half record": _Killer.half_record, "half text": _Killer.half_text, "half removed": _Killer.half_removed}


class _TornFile:
    """A text file of which only a part of the next text is written."""

    def __init__(self, file: Any, share: float, die: Callable[[], None]):
        self._file, self._share, self._die = file, share, die

    def write(self, text: str) -> None:
        self._file.write(text[: max(1, int(self._share * len(text)))])
        self._file.flush()
        self._die()

    def writelines(self, lines: Any) -> None:
        self.write("".join(lines))


def _spoil(progress: _Progress, bad_steps: frozenset[int]) -> Wrapped:
    def call(function: Callable, args: tuple, kwargs: dict) -> Any:
        totals = function(*args, **kwargs)
        return totals | {"loss": float("nan")} if progress.step in bad_steps else totals

    return call


def _wrap(target: str, call: Wrapped) -> None:
    """Put `call(function, args, kwargs)` in the place of a function; see `function_at`."""
    owner, name, function = function_at(target)
    kind = type(inspect.getattr_static(owner, name))

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return call(function, args, kwargs)

    setattr(owner, name, kind(wrapper) if kind in (staticmethod, classmethod) else wrapper)


def function_at(target: str) -> tuple[Any, str, Callable]:
    """Return what has the function `module:name` or `module:Class.name`, its name there, and the plain function."""
    module, _, path = target.partition(":")
    owner = importlib.import_module(module)
    *outer, name = path.split(".")
    for one in outer:
        owner = getattr(owner, one)
    found = inspect.getattr_static(owner, name)
    return owner, name, found.__func__ if isinstance(found, staticmethod | classmethod) else found

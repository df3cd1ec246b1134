"""One bad input, and what the command line must make of it: one clear line, an exit code, and nothing else."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import forked_launch
import pytest
from forked_launch import Launch

from megatron_gkd import cli

LIMIT_S = 60.0
"""Seconds within which every command must end."""
_UNFINISHED = ("*.unfinished*", "*.tmp", "*.partial", "hf*", "*.safetensors.*")


def unchanged(folder: Path) -> None:
    """Leave the workspace as it is: the command line alone is bad."""


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        name: of the test.
        message: what the last line on stderr must contain.
        change: makes the input bad; it is called with the workspace, the working folder.
        arguments: of the command line behind the recipe, or behind the command where that has no recipe.
        command: of the command line, with the recipe's name.
        code: the exit code.
        lines: number of lines on stderr.
        variables: environment variables.
    """

    name: str
    message: str
    change: Callable[[Path], None] = unchanged
    arguments: tuple[str, ...] = ()
    command: tuple[str, ...] = ("train", "recipe.yaml")
    code: int = 2
    lines: int = 1
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Ended:
    """The exit code of a command and what it wrote."""

    code: int
    out: str
    err: str


class _WorkBegins(BaseException):
    """A command has accepted its recipe and arguments."""


def require_one_clear_line(case: Case, folder: Path, capfd: pytest.CaptureFixture[str] | None = None) -> None:
    """Run a case in `folder`, a workspace, and compare how it ends with what the case says.

    Args:
        case: to run.
        folder: the working folder.
        capfd: where the case may end before any work begins, which needs no process of its own.
    """
    case.change(folder)
    before = _unfinished_files(folder)
    ended = _run_here(case, folder, capfd) if capfd else None
    ended = ended or _run_forked(case, folder)
    printed = f"{ended.out}{ended.err}"
    assert "Traceback" not in printed, printed
    lines = ended.err.splitlines()
    assert lines and case.message in lines[-1], f"{printed}\nexpected: {case.message}"
    assert len(lines) == case.lines, printed
    assert ended.code == case.code, printed
    assert _unfinished_files(folder) == before, "something half written is left"


def _run_here(case: Case, folder: Path, capfd: pytest.CaptureFixture[str]) -> _Ended | None:
    """Return how a case ends in this process, before its work begins; None where it begins."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, value in case.variables.items():
            patch.setenv(name, value)
        patch.setattr(cli, "_prepare", lambda *arguments, prepare=cli._prepare: prepare(*arguments) and _begin_work)
        patch.setattr("megatron_gkd.launch.launcher.launch", _begin_work)
        capfd.readouterr()
        try:
            code = cli.main([*case.command, *case.arguments])
        except _WorkBegins:
            return None
    assert time.monotonic() - began < LIMIT_S
    return _Ended(code, *capfd.readouterr())


def _begin_work(*arguments: object) -> NoReturn:
    raise _WorkBegins


def _run_forked(case: Case, folder: Path) -> _Ended:
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (*case.command, *case.arguments)
        launch = Launch(arguments, None, folder, Path(temporary) / "logs", variables=case.variables, timeout=LIMIT_S)
        ended = forked_launch.run(launch)
        written = [forked_launch.read_output(launch, stream) for stream in ("out", "err")]
    assert not ended.timed_out, written
    assert not forked_launch.orphans_of([ended.session])
    assert ended.codes.keys() == {0}, written
    return _Ended(ended.codes[0], *written)


def _unfinished_files(folder: Path) -> set[Path]:
    runs = folder / "runs"
    return {path for pattern in _UNFINISHED for path in runs.rglob(pattern)} if runs.is_dir() else set()

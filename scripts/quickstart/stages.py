"""Run the stages of an experiment, and skip those that are done already for the same inputs."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console


def fingerprint(inputs: Sequence[Path | str]) -> str:
    """Return a hash of texts, files' contents, and the contents of all files below folders, without Python's caches."""
    digest = hashlib.sha256()
    for item in inputs:
        if isinstance(item, str):
            digest.update(f"text {item}\n".encode())
            continue
        files = [item] if item.is_file() else sorted(path for path in item.rglob("*") if path.is_file())
        for path in files:
            if path.suffix != ".pyc":
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"file {path.relative_to(item)} {content}\n".encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Stage:
    """One stage: its title, what it reads and writes, and the work itself."""

    title: str
    inputs: Sequence[Path | str]
    output: Path
    work: Callable[[], None]


class Runner:
    """Runs stages in order, and keeps a stamp of each that is finished: the fingerprint of its inputs."""

    def __init__(self, stamps: Path, console: Console, fresh: bool = False) -> None:
        self._stamps, self._console, self._fresh = stamps, console, fresh
        self._number = 0
        stamps.mkdir(parents=True, exist_ok=True)

    def run(self, stage: Stage) -> None:
        self._number += 1
        stamp = self._stamps / stage.output.relative_to(self._stamps.parent).as_posix().replace("/", "-")
        current = fingerprint([str(stage.output), *stage.inputs])
        done = stage.output.exists() and stamp.is_file() and stamp.read_text() == current
        if done and not self._fresh:
            self._console.print(f"[dim]{self._number}. {stage.title}: done already[/dim]")
            return
        stamp.unlink(missing_ok=True)
        self._console.rule(f"[bold]{self._number}. {stage.title}", align="left")
        begin = time.monotonic()
        stage.work()
        stamp.write_text(current)
        self._console.print(f"[dim]{time.monotonic() - begin:.0f} s[/dim]")

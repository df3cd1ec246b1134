"""The folder of a run's training checkpoints: which are complete, whether their files are intact, and which are kept.

Needs neither torch nor Megatron. A checkpoint is written as ``step-000012.unfinished`` and renamed to ``step-000012``
when all its files and their manifest are on disk: what has no manifest under its final name is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.disk import find_free_path, publish

MANIFEST = "manifest.json"
RUN = "run.json"
_RUN_KEYS = ("layout", "with_optimizer", "identity", "progress")
_UNFINISHED = ".unfinished"
_STEP = re.compile(r"step-(\d+)")
_SET_ASIDE = re.compile(_STEP.pattern + r"\.\d+")


@dataclass(frozen=True)
class CheckpointFolder:
    """The checkpoints of a run.

    Attributes:
        path: ``output_dir/checkpoints``, which may not exist yet.
    """

    path: Path

    def final(self, step: int) -> Path:
        """Return the folder of the finished checkpoint of `step`."""
        return self.path / f"step-{step:06d}"

    def unfinished(self, step: int, attempt: int = 0) -> Path:
        """Return the folder of one attempt to save `step`: the thread of an abandoned attempt may still write."""
        return self.path / f"step-{step:06d}.{attempt}{_UNFINISHED}"

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in ascending order."""
        return [step for step in self.published_steps() if (self.final(step) / MANIFEST).is_file()]

    def published_steps(self) -> list[int]:
        """Return the steps that have a finished folder, in ascending order, even if its manifest is missing now."""
        matches = (_STEP.fullmatch(path.name) for path in self.path.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def newest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint; None where there is none."""
        steps = self.steps()
        return self.final(steps[-1]) if steps else None

    def prepare(self, step: int, run: dict[str, Any], attempt: int = 0) -> Path:
        """Create the folder of one attempt to save `step`, with the plain values `run` as ``run.json`` in it."""
        folder = self.unfinished(step, attempt)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / RUN).write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
        return folder

    def publish(self, step: int, digests: dict[str, list], attempt: int = 0) -> Path:
        """Write the manifest of the folder from `prepare` and move it to its final name; an earlier one is deleted."""
        unfinished, final = self.unfinished(step, attempt), self.final(step)
        manifest = unfinished / MANIFEST
        manifest.write_text(json.dumps({"step": step, "files": digests}, indent=1, sort_keys=True) + "\n")
        publish(unfinished, final, remove=self._delete)
        return final

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints of steps after `step`, which a run that was resumed from it has abandoned.

        Otherwise they would be the newest ones. Returns their new paths.
        """
        places = []
        for later in self.published_steps():
            if later > step:
                place = find_free_path(self.final(later))
                self.final(later).rename(place)
                places.append(place)
        return places

    def remove_leftovers(self) -> list[Path]:
        """Delete and return the folders that interrupted saves have left."""
        leftovers = [path for path in self.path.glob(f"step-*{_UNFINISHED}") if path.is_dir()]
        for path in leftovers:
            shutil.rmtree(path, ignore_errors=True)
        return leftovers

    def remove_old(self, most: int, keep: int | None = None) -> None:
        """Delete all but the newest `most` checkpoints and that of step `keep`.

        Those that were set aside are deleted when the run has come to their step again.
        """
        steps = self.steps()
        for step in steps[:-most]:
            if step != keep:
                self._delete(self.final(step))
        for path in self.path.glob("step-*"):
            match = _SET_ASIDE.fullmatch(path.name)
            if match and steps and int(match[1]) <= steps[-1]:
                self._delete(path)

    def _delete(self, path: Path) -> None:
        # Renamed first, so that an interruption never leaves a checkpoint with some of its files.
        doomed = path.with_name(path.name + _UNFINISHED)
        shutil.rmtree(doomed, ignore_errors=True)
        path.rename(doomed)
        shutil.rmtree(doomed)


def checkpoint_folder(recipe: Recipe) -> CheckpointFolder:
    """Return the checkpoints of a recipe's run."""
    return CheckpointFolder(Path(recipe.output.output_dir) / "checkpoints")


def read_run(path: Path) -> dict[str, Any]:
    """Return the plain values in a checkpoint.

    Raises:
        UserError: the file can't be read, or a value is missing.
    """
    try:
        run = json.loads((path / RUN).read_text(encoding="utf-8"))
        missing = [key for key in _RUN_KEYS if key not in run]
        missing += [] if missing else [f"progress.{key}" for key in ("step", "updates") if key not in run["progress"]]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path / RUN}: can't be read ({error})") from error
    if missing:
        raise UserError(f"{path / RUN}: lacks {', '.join(missing)}; it was not written by this release")
    return run


def digest(path: Path) -> list:
    """Flush a file to disk and return its [bytes, SHA-256]."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def read_manifest(path: Path) -> dict[str, list]:
    """Return [bytes, SHA-256] of each file of a checkpoint.

    Raises:
        UserError: the manifest is missing or can't be read.
    """
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {name: [int(expected[0]), str(expected[1])] for name, expected in sorted(files.items())}
    except FileNotFoundError as error:
        raise UserError(f"{path}: no {MANIFEST} there, so the checkpoint is incomplete") from error
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise UserError(f"{path / MANIFEST}: can't be read ({type(error).__name__}: {error})") from error


def find_misfit(file: Path, size: int) -> str | None:
    """Return one line if a file is missing or has another size than `size` bytes."""
    if not file.is_file():
        return f"{file}: missing"
    if file.stat().st_size != size:
        return f"{file}: has {file.stat().st_size} bytes; it was written with {size}"
    return None


def damages(path: Path, rank: int = 0, world_size: int = 1, report: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Compare this rank's share of the files with the manifest, and yield one line for each that differs.

    Args:
        path: the checkpoint.
        rank: of this process.
        world_size: number of ranks that share the files.
        report: called after each file.
    """
    try:
        files = list(read_manifest(path).items())
    except UserError as error:
        yield str(error)
        return
    for name, expected in files[rank::world_size]:
        file = path / name
        try:
            problem = find_misfit(file, expected[0])
            if problem is None and digest(file) != expected:
                problem = f"{file}: damaged: its SHA-256 is not the one that it was written with"
        except OSError as error:
            problem = f"{file}: can't be read ({error})"
        report()
        if problem is not None:
            yield problem


def find_damage(
    path: Path, rank: int = 0, world_size: int = 1, report: Callable[[], None] = lambda: None
) -> str | None:
    """Return the first of `damages`."""
    return next(damages(path, rank, world_size, report), None)

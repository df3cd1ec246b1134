"""The command that lists and verifies the checkpoints of a run, without torch or Megatron."""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.errors import UserError
from megatron_gkd.training.checkpointing.folder import (
    MANIFEST,
    CheckpointFolder,
    damages,
    find_misfit,
    read_manifest,
    read_run,
)
from megatron_gkd.training.checkpointing.marks import BEST, LAST, Marks

_PLACE = re.compile(r"step-(\d+)")
_COLUMNS = ("step", "size", "saved", "layout", "optimizer", "state")


@dataclass(frozen=True)
class InspectedRun:
    """The checkpoints of one run.

    Attributes:
        name: the path that the user gave.
        folder: the checkpoints.
        step: the step of the checkpoint that `name` is the path of; None where it is the path of a run.
    """

    name: str
    folder: CheckpointFolder
    step: int | None = None

    @classmethod
    def find(cls, name: str) -> InspectedRun:
        """Find the checkpoints at a path: a run's `output_dir`, its `checkpoints`, or one checkpoint."""
        path = Path(name)
        if (path / "checkpoints").is_dir():
            return cls(name, CheckpointFolder(path / "checkpoints"))
        match = re.fullmatch(r"step-(\d+)", path.resolve().name)
        if match and path.is_dir():
            return cls(name, CheckpointFolder(path.resolve().parent), int(match[1]))
        if path.is_dir() and any(path.glob("step-*")):
            return cls(name, CheckpointFolder(path))
        raise UserError(
            f"{name}: no checkpoints there; must be a run's output_dir, its folder checkpoints, or one checkpoint"
        )

    @property
    def output_dir(self) -> Path:
        """The output folder of the run."""
        return self.folder.path.parent

    def choose(self, wanted: str | None) -> int:
        """Return the step that `wanted` names: a number, `best` or `last`; None: that of the path, or the newest.

        Raises:
            UserError: there is no complete checkpoint of it.
        """
        steps, marks = self.folder.steps(), Marks(self.folder)
        if wanted is None and self.step is not None:
            wanted = str(self.step)
        if wanted in (None, LAST):
            found = marks.last()
        elif wanted == BEST:
            found = marks.best()
            if found is None and steps:
                raise UserError(f"{self.name}: no checkpoint is the best: none was saved in a step with a validation")
        elif wanted.isdecimal():
            found = int(wanted) if int(wanted) in steps else None
        else:
            raise UserError(f"STEP = {wanted}: must be the number of a step, {BEST} or {LAST}")
        if found is None:
            there_are = f"there are {', '.join(map(str, steps))}" if steps else "there is none"
            which = "no whole checkpoint" if wanted in (None, LAST, BEST) else f"no whole checkpoint of step {wanted}"
            raise UserError(f"{self.name}: {which}; {there_are}")
        return found


def list_checkpoints(run: InspectedRun) -> str:
    """Return a table of all checkpoints, complete or not."""
    marks = Marks(run.folder)
    rows = []
    for path in sorted(run.folder.path.glob("step-*"), key=lambda path: (_step_of(path) or 0, path.name)):
        with contextlib.suppress(FileNotFoundError):  # the run may delete it meanwhile
            rows += [_row(path, marks)] if path.is_dir() else []
    if not rows:
        return f"{run.name}: no checkpoint yet"
    widths = [max(len(row[column]) for row in (_COLUMNS, *rows)) for column in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if column < 2 else text.ljust(width) for column, (text, width) in enumerate(cells)
        ).rstrip()
        for cells in (list(zip(row, widths, strict=True)) for row in (_COLUMNS, *rows))
    )


def verify_checkpoints(run: InspectedRun, steps: Sequence[int]) -> tuple[list[str], list[str]]:
    """Compare all files with the manifests.

    Returns:
        A line for each intact checkpoint, and a line for each damaged file.
    """
    intact, damaged = [], []
    for path in map(run.folder.final, steps):
        found = list(damages(path))
        damaged += found
        if not found:
            sizes = [size for size, _ in read_manifest(path).values()]
            intact.append(f"{path}: intact ({len(sizes)} files, {_size(sum(sizes))})")
    return intact, damaged


def layout_in_words(layout: Any) -> str:
    """Return the text of a layout from ``state.layout_of``: `TP2+SP x PP2 x DP2, 8 processes`."""
    if not isinstance(layout, Mapping) or not isinstance(layout.get("processes"), int):
        return "unknown"
    sizes = {"TP": "tensor", "PP": "pipeline", "VPP": "virtual_pipeline", "CP": "context", "EP": "expert"}
    sizes |= {"ETP": "expert_tensor"}
    found = {short: layout.get(key) or 1 for short, key in sizes.items()}
    found["DP"] = layout["processes"] // (found["TP"] * found["PP"] * found["CP"])
    sequence = "+SP" if layout.get("sequence_parallel") else ""
    parts = [f"{short}{size}{sequence if short == 'TP' else ''}" for short, size in found.items() if size > 1]
    count = layout["processes"]
    return ", ".join([*([" x ".join(parts)] if parts else []), f"{count} process{'es' if count > 1 else ''}"])


def _row(path: Path, marks: Marks) -> Sequence[str]:
    step = _step_of(path)
    try:
        run = read_run(path)
        layout, optimizer = layout_in_words(run["layout"]), "yes" if run["with_optimizer"] else "no"
    except UserError:
        layout, optimizer = "unknown", "unknown"
    files = [file for file in path.rglob("*") if file.is_file()]
    newest = max((file.stat().st_mtime for file in files), default=path.stat().st_mtime)
    saved = datetime.datetime.fromtimestamp(newest).strftime("%Y-%m-%d %H:%M")
    state = _state(path)
    if state == "whole":
        state = ", ".join([state, *([] if step is None else marks.of(step))])
    size = _size(sum(file.stat().st_size for file in files))
    return "" if step is None else str(step), size, saved, layout, optimizer, state


def _step_of(path: Path) -> int | None:
    match = _PLACE.match(path.name)
    return int(match[1]) if match else None


def _state(path: Path) -> str:
    """Return `whole`, where all files are there in their sizes, or what is missing."""
    if path.name.endswith(".unfinished"):
        return "unfinished: being saved, or interrupted"
    if not re.fullmatch(r"step-\d+", path.name):
        return f"set aside ({path.name}): the run went back to an earlier step"
    if not (path / MANIFEST).is_file():
        return f"{MANIFEST} missing: not a checkpoint"
    try:
        misfits = [find_misfit(path / name, size) for name, (size, _) in read_manifest(path).items()]
    except UserError as error:
        return str(error).removeprefix(f"{path}/")
    wrong = [misfit.removeprefix(f"{path}/") for misfit in misfits if misfit]
    more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"damaged: {wrong[0]}{more}" if wrong else "whole"


def _size(count: int) -> str:
    """Return a number of bytes as text."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"

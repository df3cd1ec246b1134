"""The checkpoint that a run is resumed from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import RunStopped, UserError
from megatron_gkd.reporting.metrics_log import rotate
from megatron_gkd.runtime.agreement import raise_together, run_on_all, run_on_main
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, checkpoint_folder, read_run
from megatron_gkd.training.checkpointing.identity import differences, recipe_identity
from megatron_gkd.training.checkpointing.loader import newest_intact, verify


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint of this run, or of the one that it continues in another folder.

    Attributes:
        path: its folder.
        run: the plain values in it.
        origin: the path that `train.resume` named when the run was first resumed from it; None with `auto`.
        is_own: whether it is in the output folder of this run, whose records and exports are continued.
        warnings: a line for each newer, damaged checkpoint.
    """

    path: Path
    run: dict[str, Any]
    origin: str | None = None
    is_own: bool = True
    warnings: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The newest step in the checkpoint."""
        return self.run["progress"]["step"]

    def require_steps(self, train_iters: int) -> None:
        """Raise RunStopped if the run is to have fewer steps than the checkpoint."""
        if train_iters < self.step:
            raise RunStopped(
                f"train.train_iters = {train_iters}: must be at least {self.step}, the step of {self.path}"
            )

    def require_same(self, identity: dict[str, Any]) -> None:
        """Raise RunStopped, in all ranks, if the run differs from the saved one. All ranks must call it."""
        lines = differences(identity, self.run["identity"], str(self.path))
        hint = "\nContinue with what it was trained with, or start anew: train.resume = never"
        raise_together("\n".join(lines) + hint if lines else None, RunStopped)


def find_resume_point(recipe: Recipe) -> ResumePoint | None:
    """Find the checkpoint that `train.resume` names, before anything is built; None to start at step 1.

    All ranks must call it.

    Raises:
        RunStopped: in all ranks; the checkpoint is damaged or of a run with other settings.
    """
    folder, wanted = checkpoint_folder(recipe), recipe.train.resume
    if wanted == "never":
        _set_aside(folder)
        return None
    point = _newest(folder) if wanted == "auto" else _at(wanted, folder)
    if point is None:
        return None
    point.require_same(recipe_identity(recipe))
    if point.is_own:
        run_on_main(folder.remove_leftovers)
    else:
        _set_aside(folder)
    return point


def _newest(folder: CheckpointFolder) -> ResumePoint | None:
    """Return the newest intact checkpoint of this run; None if it has none yet."""
    path, warnings = newest_intact(folder)
    if path is None and warnings:
        raise RunStopped(f"{warnings[0]}; no older checkpoint is whole. Start anew with train.resume = never")
    if path is None:
        run_on_main(folder.remove_leftovers)
        return None
    run = _read_resumable(path)
    return ResumePoint(path, run, origin=run.get("origin"), warnings=tuple(warnings))


def _at(wanted: str, folder: CheckpointFolder) -> ResumePoint:
    """Return the checkpoint at a path, or the newest one of this run if the run was resumed from that path already.

    So the same command continues a run that is interrupted after it was resumed from a path.
    """
    origin = run_on_main(lambda: str(Path(wanted).resolve()))
    if run_on_main(lambda: _origin_of_newest(folder)) == origin:
        point = _newest(folder)
        if point is not None:
            return point
    path = find_checkpoint(wanted, "train.resume")
    is_own = run_on_main(lambda: path.resolve().parent == folder.path.resolve())
    return ResumePoint(path, _read_resumable(path), origin=origin, is_own=is_own)


def _origin_of_newest(folder: CheckpointFolder) -> str | None:
    newest = folder.newest()
    try:
        return None if newest is None else read_run(newest).get("origin")
    except UserError:  # it is damaged, and the path that is wanted may be whole
        return None


def _set_aside(folder: CheckpointFolder) -> None:
    run_on_main(lambda: rotate(folder.path), os_error=f"{folder.path}: can't be renamed")


def _read_resumable(path: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint; raise RunStopped, in all ranks, if it lacks what a run needs."""

    def read() -> dict[str, Any]:
        run = read_run(path)
        if not run["with_optimizer"]:
            raise UserError(
                f"train.resume: {path} has no optimizer state (it was saved with output.save_optim = false); start a "
                "new run from its weights: train.init_from"
            )
        return run

    return run_on_all(read, RunStopped)


def find_checkpoint(wanted: str, key: str) -> Path:
    """Return the checkpoint at a path, or the newest one of the run at that path. All ranks must call it.

    Args:
        wanted: the path.
        key: of the recipe, which has the path.

    Raises:
        RunStopped: in all ranks; it is damaged or incomplete.
    """
    path = Path(wanted)
    path = CheckpointFolder(path / "checkpoints").newest() or CheckpointFolder(path).newest() or path
    problem = verify(path)
    raise_together(None if problem is None else f"{key} = {wanted}: {problem}", RunStopped)
    return path

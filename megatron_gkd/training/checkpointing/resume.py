"""The checkpoint that a run is resumed from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import RunStopped, UserError
from megatron_gkd.reporting.metrics_log import rotate
from megatron_gkd.runtime.agreement import raise_together, run_on_all
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, checkpoint_folder, read_run
from megatron_gkd.training.checkpointing.identity import differences, recipe_identity
from megatron_gkd.training.checkpointing.loader import newest_intact, verify


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint of this run.

    Attributes:
        path: its folder.
        run: the plain values in it.
        warnings: a line for each newer, damaged checkpoint.
    """

    path: Path
    run: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The newest step in the checkpoint."""
        return self.run["progress"]["step"]

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
        if dist.get_rank() == 0:
            rotate(folder.path)
        dist.barrier()
        return None
    warnings: list[str] = []
    if wanted == "auto":
        if dist.get_rank() == 0:
            folder.remove_leftovers()
        dist.barrier()
        path, warnings = newest_intact(folder)
        if path is None and warnings:
            raise RunStopped(f"{warnings[0]}; no older checkpoint is whole. Start anew with train.resume = never")
        if path is None:
            return None
    else:
        path = find_checkpoint(wanted)
    point = ResumePoint(path, _read_resumable(path), tuple(warnings))
    point.require_same(recipe_identity(recipe))
    return point


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


def find_checkpoint(wanted: str) -> Path:
    """Return the checkpoint at a path, or the newest one of the run at that path. All ranks must call it.

    Raises:
        RunStopped: in all ranks; it is damaged or incomplete.
    """
    path = Path(wanted)
    path = CheckpointFolder(path / "checkpoints").newest() or CheckpointFolder(path).newest() or path
    raise_together(verify(path), RunStopped)
    return path

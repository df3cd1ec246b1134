"""Reading checkpoints into a run that has just been built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.agreement import first_problem, raise_together
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, find_damage, read_run
from megatron_gkd.training.checkpointing.state import Saved, layout_of, set_random_states
from megatron_gkd.training.checkpointing.workarounds import apply_workarounds, separate_steps


def verify(path: Path) -> str | None:
    """Compare all files with the manifest, each rank its share. Returns the first damage on every rank."""
    return first_problem(find_damage(path, dist.get_rank(), dist.get_world_size()))


def newest_intact(folder: CheckpointFolder) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose files are all as they were written, and what is wrong with newer ones."""
    problems = []
    for step in reversed(folder.steps()):
        problem = verify(folder.final(step))
        if problem is None:
            return folder.final(step), problems
        problems.append(problem)
    return None, problems


@torch.no_grad()
def load(saved: Saved, path: Path, step: int) -> None:
    """Load a verified checkpoint into a new student, after its teacher is built. All ranks must call it.

    step: that it was saved after.

    Raises:
        UserError: in all ranks, if it is of another model, or has no optimizer state.
    """
    apply_workarounds()
    student = saved.student
    run = read_run(path)
    if not run["with_optimizer"]:
        raise UserError(f"train.resume: {path} has no optimizer state (output.save_optim = false); use train.init_from")
    _require_same_kind(saved, path, run)
    same_layout = run["layout"] == layout_of(student.mesh)
    found = _read(path, saved.to_read(same_layout=same_layout))
    saved.load_model(found["model"])
    student.optimizer.load_state_dict(found["optimizer"])
    separate_steps(student.optimizer)
    student.scheduler.num_steps = 0
    student.scheduler.step(step)
    saved.load_averages(found.get("averages", {}))
    if same_layout:
        set_random_states(found["random"])


@torch.no_grad()
def load_weights(saved: Saved, path: Path) -> None:
    """Load the student's weights alone from a verified checkpoint, into a new student. All ranks must call it.

    UserError in all ranks if it is of another model.
    """
    _require_same_kind(saved, path, read_run(path))
    found = _read(path, {"model": saved.model_state()})
    saved.load_model(found["model"])
    saved.student.optimizer.reload_model_params()


def _require_same_kind(saved: Saved, path: Path, run: dict[str, Any]) -> None:
    """UserError, in all ranks, if the checkpoint is of adapters and the student of all parameters, or vice versa."""
    has, holds = saved.student.model.adapters is not None, run.get("only_adapters", False)
    if has != holds:
        kinds = {True: "of adapters (tuner_type = lora)", False: "of all parameters (tuner_type = full)"}
        raise UserError(f"{path}: a checkpoint {kinds[holds]}; this run trains those {kinds[has]}")


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    problem, found = None, {}
    try:
        found = dist_checkpointing.load(wanted, str(path))
    except Exception as error:
        problem = f"{path}: can't be loaded into this model ({type(error).__name__}: {str(error).splitlines()[0]})"
    raise_together(problem)
    return found

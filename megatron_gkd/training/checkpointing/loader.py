"""Load checkpoints into a run that has just been built."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException

from megatron_gkd.errors import RunStopped
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime.agreement import first_problem, run_on_all
from megatron_gkd.runtime.current_phase import note_progress
from megatron_gkd.training.checkpointing.folder import CheckpointFolder, find_damage, read_run
from megatron_gkd.training.checkpointing.state import Saved, layout_of, model_state, set_random_states
from megatron_gkd.training.checkpointing.workarounds import apply_workarounds, separate_steps

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner
from megatron.core.dist_checkpointing.validation import StrictHandling

_LONGEST_REASON = 200  # characters; some list all tensors of the model
_EXTRA = "._extra_state"
"""In the names of what layers keep beside their weights: FP8's scales, and nothing in most of them.

Experts one by one have it, grouped ones do not; a run that changes between them begins without it.
"""
_NO_WEIGHTS = re.compile(r"optimizer\.|average\d+\.|random$")  # these keys need not be wanted


def verify(path: Path) -> str | None:
    """Compare all files with the manifest, each rank its share. Return the first damage, on every rank."""
    with phase(f"Verifying the checkpoint {path}", is_main=dist.get_rank() == 0):
        return first_problem(find_damage(path, dist.get_rank(), dist.get_world_size(), note_progress))


def newest_intact(folder: CheckpointFolder) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, and a line for each newer, damaged one. All ranks must call it."""
    problems: list[str] = []
    for step in reversed(folder.published_steps()):
        problem = verify(folder.final(step))
        if problem is None:
            return folder.final(step), problems
        problems.append(problem)
    return None, problems


@torch.no_grad()
def load(saved: Saved, path: Path, step: int) -> None:
    """Load a verified checkpoint into a new student, after its teacher is built. All ranks must call it.

    Args:
        saved: the parts to load into.
        path: the checkpoint.
        step: the step that it was saved after.

    Raises:
        RunStopped: in all ranks; it is of another model.
    """
    apply_workarounds()
    student = saved.student
    run = read_run(path)
    _require_same_kind(student.model, path, run)
    same_layout = run["layout"] == layout_of(student.mesh)
    found = _read(path, saved.to_read(same_layout=same_layout))
    _set_weights(student.model, found.get("model", {}))
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

    Raises:
        RunStopped: in all ranks; it is of another model.
    """
    saved.student.gather_parameters()
    load_model(saved.student.model, path)
    saved.student.optimizer.reload_model_params()


@torch.no_grad()
def load_model(model: MegatronModel, path: Path) -> None:
    """Load the weights of a verified checkpoint into a model. All ranks must call it.

    Raises:
        RunStopped: in all ranks; it is of another model.
    """
    _require_same_kind(model, path, read_run(path))
    _set_weights(model, _read(path, {"model": model_state(model)}).get("model", {}))


def _read(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    def load() -> dict[str, Any]:
        try:
            main = dist.get_rank() == 0
            with _noted_progress(), phase(f"Loading the checkpoint {path}", is_main=main):
                found, left, lacking = dist_checkpointing.load(wanted, str(path), strict=StrictHandling.RETURN_ALL)
        except (Exception, CheckpointException) as error:  # torch's is a BaseException
            raise RunStopped(f"{path}: can't be loaded into this model ({_reason(error)})") from error
        # Megatron does not report tensors that are left over: a tied model would ignore an untied head.
        missing = sorted(key for key in lacking if _EXTRA not in key)
        unmatched = missing or sorted(key for key in left if _EXTRA not in key and not _NO_WEIGHTS.match(key))
        if unmatched:
            where = "not there" if missing else "not in the model"
            raise RunStopped(
                f"{path}: can't be loaded into this model: {unmatched[0]} is {where} (tensors: {len(unmatched)})"
            )
        return found

    return run_on_all(load, RunStopped)


@contextlib.contextmanager
def _noted_progress() -> Iterator[None]:
    """Let each tensor that Megatron reads inside count as progress of the phase."""
    commit = MCoreLoadPlanner.commit_tensor

    def commit_and_note(planner: MCoreLoadPlanner, *arguments: Any) -> None:
        note_progress()
        commit(planner, *arguments)

    MCoreLoadPlanner.commit_tensor = commit_and_note
    try:
        yield
    finally:
        MCoreLoadPlanner.commit_tensor = commit


def _reason(error: BaseException) -> str:
    """Return the first cause on one short line: torch collects the errors of all ranks with their tracebacks."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


def _require_same_kind(model: MegatronModel, path: Path, run: dict[str, Any]) -> None:
    """Raise RunStopped, in all ranks, if only one of checkpoint and model has adapters."""
    has, holds = model.adapters is not None, run.get("only_adapters", False)
    if has != holds:
        kinds = {True: "of adapters (tuner_type = lora)", False: "of all parameters (tuner_type = full)"}
        raise RunStopped(f"{path}: a checkpoint {kinds[holds]}; this run trains those {kinds[has]}")


def _set_weights(model: MegatronModel, state: dict[str, Any]) -> None:
    """Set the weights that were loaded for `model_state`: none on a pipeline stage without adapters."""
    if model.adapters is not None:
        for factor in model.adapters.factors:
            factor.parameter.copy_(state["adapters"][factor.name])
        return
    for index, chunk in enumerate(model.chunks):
        own = {name: value for name, value in chunk.state_dict().items() if _EXTRA in name}
        chunk.load_state_dict(own | state[f"model{index}"], strict=True)

"""The end of a run that fails: save the student, and describe what is saved in the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from megatron_gkd.errors import GkdError, RunStopped, ServiceError
from megatron_gkd.runtime.agreement import FailureMeeting
from megatron_gkd.runtime.current_phase import in_phase
from megatron_gkd.runtime.lost_peers import is_of_lost_peer
from megatron_gkd.training.exports import ExportFolders

OTHERS_FAIL_WITHIN_S = 5.0
OTHERS_LOSE_SERVER_WITHIN_S = 30.0  # each rank finds by itself, after its own retries, that a server is gone


@dataclass
class RunState:
    """The progress of a run.

    Attributes:
        train_iters: number of steps of the whole run.
        step: the newest step whose update is done or skipped; 0 before the first.
        updates: number of steps that changed the student.
        is_updating: whether an update is in progress, so that only some weights may be new.
    """

    train_iters: int
    step: int = 0
    updates: int = 0
    is_updating: bool = False

    @property
    def skipped_steps(self) -> int:
        """Number of steps that did not change the student."""
        return self.step - self.updates


@dataclass(frozen=True)
class Rescue:
    """The functions that save a run before it fails. All ranks must call them together.

    Attributes:
        save_checkpoint: returns False if there is no checkpoint to resume from.
        export: returns the folders of the export.
        command: how the run is continued from its checkpoint.
    """

    save_checkpoint: Callable[[], bool]
    export: Callable[[], ExportFolders]
    command: str = "the same command"


def stop(error: Exception, meeting: FailureMeeting, state: RunState, rescue: Rescue) -> NoReturn:
    """Save the student, if every rank has failed, and raise `error` with the result. All ranks that fail call it.

    Raises:
        RunStopped: `error` is one that the user can act on; shared where all ranks failed for the same reason.
        Exception: any other `error`, with a note.
    """
    with in_phase("rescue", is_ending=True):
        seconds = _time_for_others(error)
        failures = meeting.join(_describe(error), seconds)
        if failures is None:
            saved = f"Not every rank failed within {seconds:g} s of this one, so the student could not be saved"
        else:
            saved = _save(state, rescue)
    reason = f"stopped after step {state.step} of {state.train_iters}"
    if not isinstance(error, GkdError):
        error.add_note(f"{reason}. {saved}")
        raise error
    is_shared = failures is not None and len(set(failures)) == 1
    raise RunStopped(f"{reason}: {error}\n{saved}", exit_code=error.exit_code, is_shared=is_shared) from error


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _time_for_others(error: Exception) -> float:
    """Return the seconds that the other ranks have to fail, too."""
    if isinstance(error, GkdError):  # ranks that learn from another one that a server is gone have its exit code
        return OTHERS_LOSE_SERVER_WITHIN_S if error.exit_code == ServiceError.exit_code else OTHERS_FAIL_WITHIN_S
    # A rank that has ended can't save with the others any more.
    return 0.0 if is_of_lost_peer(_describe(error)) else OTHERS_FAIL_WITHIN_S


def _save(state: RunState, rescue: Rescue) -> str:
    """Save and export the student. Return what there is, and how to continue. All ranks must call it."""
    if not state.updates:
        return "Nothing has been learned yet, so nothing is exported"
    if state.is_updating:
        return "The weights are in the middle of an update, so they are not exported"
    try:
        is_resumable = rescue.save_checkpoint()
    except Exception:  # it may wait for the very samples that have failed
        is_resumable = False
    try:
        folders = rescue.export()
    except Exception as error:
        return f"The student could not be exported: {type(error).__name__}: {error}"
    student = f"The student of step {state.step} is in {folders}"
    if is_resumable:
        return f"{student}; {rescue.command} continues the run from its checkpoint"
    return (
        f"{student}. A run with {folders.start_option} and another --output_dir starts from its weights, but "
        "otherwise anew: at step 1, with a new optimizer and learning-rate schedule, and with the same rows in the "
        "same order unless train.seed is another"
    )

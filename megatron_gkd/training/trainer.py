"""The training loop, whole on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.errors import Interrupted, RunStopped, UserError
from megatron_gkd.models.adapter_export import export_adapters
from megatron_gkd.models.export import export_checkpoint
from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.reporting.reporter import Reporter
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import FailureMeeting, run_on_all
from megatron_gkd.runtime.current_phase import in_phase, iterate_in_phase
from megatron_gkd.teachers.base import FollowsStudent, ReadOnce, TeacherSignal, TeacherSource
from megatron_gkd.training.bad_steps import BadSteps
from megatron_gkd.training.batches import TrainingData, announce_ahead, prepare_batch
from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
from megatron_gkd.training.completion_recorder import CompletionRecorder
from megatron_gkd.training.exports import ExportFolders, Exports
from megatron_gkd.training.guards import Guards
from megatron_gkd.training.interruptions import Interruptions
from megatron_gkd.training.metrics import MismatchWarning, TruncationWarning, summarize
from megatron_gkd.training.rescue import Rescue, RunState, stop
from megatron_gkd.training.student import Student


@dataclass(frozen=True)
class TrainerConfig:
    """The settings of the training loop.

    Attributes:
        train_iters: number of steps of the whole run.
        eval_interval: steps between validations; None: only after the last step.
        max_bad_steps: recipe key `train.max_bad_steps`.
        mismatch_kl_threshold: recipe key `rollout.mismatch_kl_threshold`.
        completion_ends: what ends the student's completions, for people.
        teacher_is_student: whether teacher and student start with the same weights, so that their divergence must be 0.
    """

    train_iters: int
    eval_interval: int | None = None
    max_bad_steps: int = 10
    mismatch_kl_threshold: float | None = None
    completion_ends: str = ""
    teacher_is_student: bool = False


@dataclass(frozen=True)
class RunOutput:
    """All that a run writes.

    Attributes:
        reporter: metrics and messages.
        exports: the student in Hugging Face format.
        checkpoints: what a run is resumed from; None: none are kept.
        completions: records of what the student samples; None: not written.
    """

    reporter: Reporter
    exports: Exports
    checkpoints: RunCheckpoints | None = None
    completions: CompletionRecorder | None = None


class Trainer:
    """Train a student.

    Args:
        config: the settings of the loop.
        student: the model in training.
        teacher: the source of the teacher's distributions; None trains with plain cross-entropy.
        data: training and validation rows.
        output: all that the run writes.
        interruptions: what may end the run before its last step.

    Attributes:
        state: how far the run has come.
    """

    def __init__(
        self,
        config: TrainerConfig,
        student: Student,
        teacher: TeacherSource | None,
        data: TrainingData,
        output: RunOutput,
        interruptions: Interruptions | None = None,
    ) -> None:
        self.config, self.student, self.teacher, self.data = config, student, teacher, data
        self.reporter, self.exports = output.reporter, output.exports
        self.checkpoints, self.completions = output.checkpoints, output.completions
        self.interruptions = interruptions or Interruptions()
        self.mismatch_warning = MismatchWarning(config.mismatch_kl_threshold)
        self.truncation_warning = TruncationWarning(config.completion_ends)
        self.guards = Guards(
            student.objective.vocab_size,
            has_teacher=teacher is not None,
            same_as_teacher=student.model.config.params_dtype if config.teacher_is_student else None,
        )
        self.bad_steps = BadSteps(self.exports.output_dir / "bad_steps", config.max_bad_steps)
        self.state = RunState(config.train_iters)

    def progress(self) -> dict[str, Any]:
        """Return the plain values that a checkpoint needs, the same on all ranks. All ranks must call it."""
        rollouts = self.data.rollouts
        return {
            "step": self.state.step,
            "updates": self.state.updates,
            "bad_steps_in_a_row": self.bad_steps.in_a_row,
            "exports": self.exports.made,
            "mismatch_warnings": self.mismatch_warning.count,
            "sampled_steps": 0 if self.completions is None else self.completions.sampled_steps,
            "rollouts": None if rollouts is None else rollouts.progress(self.state.step),
            "stream": None if self.data.stream is None else self.data.stream.progress(self.state.step).values(),
        }

    def restore(self, progress: Mapping[str, Any], *, is_own: bool = True) -> None:
        """Continue from what `progress` returned.

        Args:
            progress: of the run's newest checkpoint.
            is_own: whether this checkpoint and the exports up to it are in the output folder of this run.
        """
        self.state.step, self.state.updates = progress["step"], progress["updates"]
        self.bad_steps.in_a_row = progress["bad_steps_in_a_row"]
        if is_own:
            self.exports.restore(progress["exports"])
            if self.checkpoints is not None:
                self.checkpoints.saved_step = self.state.step
        self.mismatch_warning.count = progress["mismatch_warnings"]
        if self.completions is not None:
            self.completions.sampled_steps = progress["sampled_steps"]
        if self.data.rollouts is not None and progress["rollouts"] is not None:
            self.data.rollouts.restore(progress["rollouts"])

    def run(self) -> ExportFolders:
        """Train to the end and return the folders of the final export. All ranks must call it.

        Raises:
            Interrupted: a signal or the time limit has ended the run, which is saved.
            RunStopped: all ranks failed together for a reason that the user can act on. As with every other exception
                that all ranks reach, the student is exported before.
        """
        meeting = FailureMeeting.create()
        try:
            folders = self._run()
        except Interrupted:
            raise
        except Exception as error:
            command = "" if self.checkpoints is None else self.checkpoints.command
            stop(error, meeting, self.state, Rescue(self.save_checkpoint, self.export_now, command))
        if self.bad_steps.in_a_row:
            self.reporter.plot()
            raise RunStopped(
                f"The last {self.bad_steps.in_a_row} steps had a loss or gradient that is not finite and changed "
                f"nothing; the student in {folders} is probably broken. See {self.bad_steps.folder}"
            )
        return folders

    def _run(self) -> ExportFolders:
        first = self.state.step + 1
        self.interruptions.begin()
        batches = iterate_in_phase("data", announce_ahead(self.data.batches, self.teacher), first)
        for step, microbatches in enumerate(batches, start=first):
            self.train_step(step, microbatches)
            self._finish_step(step, is_last=step == self.config.train_iters)
        if self.checkpoints is not None:
            self.checkpoints.finish()
        return self.export(self.exports.final())

    def _finish_step(self, step: int, *, is_last: bool) -> None:
        """Validate, export and save where it is due after `step`; end the run if it is interrupted."""
        if is_last:  # so that the last checkpoint knows this run's export from an earlier one's
            self._claim(self.exports.final())
        if is_last or (self.config.eval_interval and step % self.config.eval_interval == 0):
            with in_phase("validation"):
                self.validate(step)
        if not is_last and self.exports.is_due(step):
            self.export(self.exports.of_step(step))
            self.exports.remove_old(is_main=self.student.mesh.is_main)
        if self.checkpoints is not None:
            with in_phase("checkpoint"):
                self.checkpoints.poll()
                if is_last or self.checkpoints.is_due(step):
                    self.checkpoints.save(step, self.progress)
        if not (is_last and self.checkpoints is None):
            self.end_if_interrupted()

    def end_if_interrupted(self) -> None:
        """Save the run and end it if a signal or the time limit requires it. All ranks must call it.

        Raises:
            Interrupted: the run is saved and ends.
            UserError: the run ends, and its checkpoint could not be saved.
        """
        reason = self.interruptions.agree()
        if reason is None:
            return
        state = self.state
        LOGGER.info(f"{reason}: saving after step {state.step}")
        if self.checkpoints is None:
            saved = f"no checkpoints are kept (output.save_interval = null); the student is in {self.export_now()}"
        elif self.save_checkpoint():
            saved = f"saved in {self.checkpoints.path_of(state.step)}; {self.checkpoints.command} continues the run"
        else:  # not an Interrupted: a restart would not find what was learned
            raise UserError(f"{reason}: the checkpoint of step {state.step} could not be saved")
        self.reporter.plot()
        raise Interrupted(f"{reason}: stopped after step {state.step} of {state.train_iters}; {saved}")

    def train_step(self, step: int, microbatches: list[Microbatch] | None) -> None:
        """Train for one step. Without microbatches the student samples them. All ranks must call it."""
        start = time.perf_counter()
        batch = prepare_batch(step, microbatches, self.data.rollouts, self.student)
        rolled_out = time.perf_counter()
        signals = self.score(batch.microbatches)
        portability.synchronize()
        scored = time.perf_counter()
        learning_rate = self.student.learning_rate
        with in_phase("student"):
            totals = self.student.compute_gradients(batch.microbatches, signals)
        self._check(step, totals, batch.microbatches)
        with in_phase("optimizer"):
            grad_norm = self.update(step, totals)
        portability.synchronize()
        record = {
            "step": step,
            **summarize(totals, has_teacher=self.teacher is not None),
            "grad_norm": grad_norm,
            "skipped_steps": self.state.skipped_steps,
            "lr": learning_rate,
            **batch.describe(totals),
            "teacher_time_s": scored - rolled_out,
            "step_time_s": time.perf_counter() - start,
        }
        if batch.probed_mismatch_kl is not None and record.get("mismatch_kl") is None:
            record["mismatch_kl"] = batch.probed_mismatch_kl
        completions = None
        if batch.report is not None and self.completions is not None:
            completions = self.completions.of_step(
                step, batch.report, batch.microbatches, self.student.token_divergence
            )
        self.write(record, completions)
        if not math.isfinite(totals["loss"]) or (grad_norm is not None and not math.isfinite(grad_norm)):
            LOGGER.warning(f"step {step}: skipped: the loss or the gradient is not finite")
            self.bad_steps.record(step, totals["loss"], grad_norm, batch.microbatches, self.student.mesh)

    def _check(self, step: int, totals: Mapping[str, float], microbatches: Sequence[Microbatch]) -> None:
        """Raise a UserError where the totals of `step` show that the run is wrong, before the update."""
        if math.isfinite(totals["loss"]):
            self.guards.check(step, totals, microbatches)
        elif not self.state.updates:
            raise UserError(
                f"step {step}: the loss is {totals['loss']} before the first update; look for broken weights"
            )

    def update(self, step: int, totals: Mapping[str, float]) -> float | None:
        """Update the student from its gradient, unless there are no labels or the loss or the gradient is not finite.

        Returns the gradient's norm: None where it is not computed, NaN where it is not finite.
        """
        grad_norm, self.state.is_updating = None, True
        if totals["tokens"] and math.isfinite(totals["loss"]):
            grad_norm = self.student.update()
        else:
            self.student.skip_update()
        if grad_norm is not None and math.isfinite(grad_norm):
            self.state.updates += 1
            self.bad_steps.in_a_row = 0
            if self.teacher is not None and isinstance(self.teacher, FollowsStudent):
                self.teacher.after_update()
        self.state.step, self.state.is_updating = step, False
        return grad_norm

    def write(self, record: dict[str, Any], completions: Sequence[dict[str, Any]] | None) -> None:
        """Write a step's record. All ranks must call it.

        Raises:
            UserError: in all ranks; the main rank can't write.
        """

        def report() -> None:
            self.reporter.step(record)
            for warning in (
                self.mismatch_warning.of_step(record["step"], record.get("mismatch_kl")),
                self.truncation_warning.of_step(record["step"], record.get("truncated_share")),
            ):
                if warning is not None:
                    LOGGER.warning(warning)
            if completions is not None:
                self.reporter.completions(completions)

        self._report(report)

    def _report(self, report: Callable[[], None]) -> None:
        """Write to the output folder; a failure of the main rank is raised in all."""
        run_on_all(report, os_error=f"output.output_dir = {self.exports.output_dir}: can't be written to")

    def validate(self, step: int) -> None:
        """Report the loss over the validation rows, if there are any. All ranks must call it."""
        if self.data.validation is None:
            return
        totals: dict[str, float] = {}
        for microbatches in self.data.validation:
            on_device = [microbatch.to(portability.device()) for microbatch in microbatches or ()]
            for name, value in self.student.evaluate(on_device, self.score(on_device)).items():
                totals[name] = totals.get(name, 0.0) + value
        record = summarize(totals, has_teacher=self.teacher is not None)
        self._report(lambda: self.reporter.validation({"step": step, **record}))
        if self.checkpoints is not None:
            self.checkpoints.validation = step, record["loss" if self.teacher is None else "divergence"]

    def score(self, microbatches: Sequence[Microbatch]) -> Sequence[TeacherSignal | None]:
        """Return the teacher's signal for each microbatch; None where there is no teacher. All ranks must call it."""
        if self.teacher is None:
            return [None] * len(microbatches)
        with in_phase("teacher"), self.teacher.resident():
            return ReadOnce(self.teacher.score(microbatches))

    def export(self, folders: ExportFolders) -> ExportFolders:
        """Export the student as it is. All ranks must call it."""
        self.student.gather_parameters()
        LOGGER.info(f"exporting to {folders}")
        self._claim(folders)
        with in_phase("export"):
            if folders.adapters is not None:
                export_adapters(self.student.model, folders.adapters)
            if folders.checkpoint is not None:
                export_checkpoint(self.student.model, folders.checkpoint)
        return folders

    def _claim(self, folders: ExportFolders) -> None:
        """Note `folders` as this run's, and keep an earlier run's at the same place."""
        self._report(lambda: self.exports.claim(folders, is_main=self.student.mesh.is_main))

    def save_checkpoint(self) -> bool:
        """Save a checkpoint of the run as it is, and wait for it. Returns False if it can't. All ranks must call it."""
        if self.checkpoints is None:
            return False
        with in_phase("checkpoint"):
            return self.checkpoints.save(self.state.step, self.progress) and self.checkpoints.finish()

    def export_now(self) -> ExportFolders:
        """Export the student as it is, before the run fails. All ranks must call it."""
        folders = self.export(self.exports.of_step(self.state.step))
        self.reporter.plot()
        return folders

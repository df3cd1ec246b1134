"""The training loop, whole on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import FROM_DATASET
from megatron_gkd.errors import Interrupted, RunStopped, UserError
from megatron_gkd.models.adapter_export import export_adapters
from megatron_gkd.models.export import export_checkpoint
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import FailureMeeting, run_on_all
from megatron_gkd.teachers.base import FollowsStudent, ReadOnce, TeacherSignal, TeacherSource
from megatron_gkd.training.ahead import announce_ahead
from megatron_gkd.training.bad_steps import BadSteps
from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
from megatron_gkd.training.completion_recorder import CompletionRecorder
from megatron_gkd.training.exports import ExportFolders, Exports
from megatron_gkd.training.guards import Guards
from megatron_gkd.training.interruptions import Interruptions
from megatron_gkd.training.metrics import MismatchWarning, Reporter, describe_rollouts, summarize
from megatron_gkd.training.on_policy import Rollouts
from megatron_gkd.training.rescue import Rescue, RunState, stop
from megatron_gkd.training.student import Student


class Trainer:
    """`teacher` None trains with plain cross-entropy. `validation` may be None.

    `rollouts` makes the steps for which `batches` has None, and `completions` tells of them. `teacher_is_student`: they
    begin as the same model.
    """

    def __init__(
        self,
        student: Student,
        teacher: TeacherSource | None,
        batches: StepLoader,
        validation: Iterable[list[Microbatch]] | None,
        reporter: Reporter,
        *,
        rollouts: Rollouts | None = None,
        completions: CompletionRecorder | None = None,
        mismatch_kl_threshold: float | None = None,
        teacher_is_student: bool = False,
        train_iters: int,
        eval_interval: int | None,
        exports: Exports,
        max_bad_steps: int = 10,
        checkpoints: RunCheckpoints | None = None,
        interruptions: Interruptions | None = None,
    ) -> None:
        self.student, self.teacher = student, teacher
        self.batches, self.validation, self.reporter = batches, validation, reporter
        self.rollouts, self.completions = rollouts, completions
        self.mismatch_warning = MismatchWarning(mismatch_kl_threshold)
        self.guards = Guards(
            student.objective.vocab_size,
            has_teacher=teacher is not None,
            same_as_teacher=student.model.config.params_dtype if teacher_is_student else None,
        )
        self.eval_interval, self.exports = eval_interval, exports
        self.bad_steps = BadSteps(exports.output_dir / "bad_steps", max_bad_steps)
        self.state = RunState(train_iters)
        self.checkpoints, self.interruptions = checkpoints, interruptions or Interruptions()
        if checkpoints is not None:
            checkpoints.progress = self.progress

    def progress(self) -> dict[str, Any]:
        """Return the plain values that a checkpoint needs, the same on all ranks. All ranks must call it."""
        return {
            "step": self.state.step,
            "updates": self.state.updates,
            "bad_steps_in_a_row": self.bad_steps.in_a_row,
            "exports": self.exports.made,
            "mismatch_warnings": self.mismatch_warning.count,
            "sampled_steps": 0 if self.completions is None else self.completions.sampled_steps,
            "rollouts": None if self.rollouts is None else self.rollouts.progress(),
        }

    def restore(self, progress: Mapping[str, Any]) -> None:
        """Go on from what `progress` returned."""
        self.state.step, self.state.updates = progress["step"], progress["updates"]
        self.bad_steps.in_a_row = progress["bad_steps_in_a_row"]
        self.exports.restore(progress["exports"])
        self.mismatch_warning.count = progress["mismatch_warnings"]
        if self.completions is not None:
            self.completions.sampled_steps = progress["sampled_steps"]
        if self.rollouts is not None and progress["rollouts"] is not None:
            self.rollouts.restore(progress["rollouts"])

    def run(self) -> ExportFolders:
        """Train to the end. Returns the folders of the final export. All ranks must call it.

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
            stop(error, meeting, self.state, Rescue(self.save_checkpoint, self.export_now))
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
        for step, microbatches in enumerate(announce_ahead(self.batches, self.teacher), start=first):
            self.train_step(step, microbatches)
            last = step == self.state.train_iters
            if self.validation is not None and (last or (self.eval_interval and step % self.eval_interval == 0)):
                self.validate(step)
            if not last and self.exports.is_due(step):
                self.export(self.exports.of_step(step))
                self.exports.forget_old(self.student.mesh.is_main)
            if self.checkpoints is not None:
                self.checkpoints.poll()
                if last or self.checkpoints.is_due(step):
                    self.checkpoints.save(step)
            if not (last and self.checkpoints is None):
                self.end_if_interrupted()
        if self.checkpoints is not None:
            self.checkpoints.finish()
        return self.export(self.exports.final())

    def end_if_interrupted(self) -> None:
        """Save the run and end it if a signal or the time limit asks for it. All ranks must call it.

        Raises:
            Interrupted: it did, and the run is saved.
        """
        reason = self.interruptions.agree()
        if reason is None:
            return
        state = self.state
        self.reporter.message(f"{reason}: saving after step {state.step}")
        if self.save_checkpoint():
            saved = f"saved in {self.checkpoints.path_of(state.step)}; the same command continues the run"
        elif self.checkpoints is not None:  # not an Interrupted: a restart would not find what was learned
            raise UserError(f"{reason}: the checkpoint of step {state.step} could not be saved")
        else:
            saved = f"no checkpoints are kept (output.save_interval = null); the student is in {self.export_now()}"
        self.reporter.plot()
        raise Interrupted(f"{reason}: stopped after step {state.step} of {state.train_iters}; {saved}")

    def train_step(self, step: int, microbatches: list[Microbatch] | None) -> None:
        """One step, counted from 1. Without microbatches the student samples them."""
        start = time.perf_counter()
        sampled, sync_time, probed = None, 0.0, None
        if microbatches is None:
            if not self.rollouts.has_begun(step):
                sync_time += self.rollouts.load_weights(self.student, step - 1)
            microbatches, sampled = self.rollouts.microbatches(step)
        if self.rollouts is not None and self.rollouts.is_early(step + 1):
            sync_time += self.rollouts.load_weights(self.student, step - 1)
            probed = self.rollouts.probe_mismatch(self.student, step + 1)
            self.rollouts.begin(step + 1)
        rolled_out = time.perf_counter()
        microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
        signals = self.score(microbatches)
        portability.synchronize()
        scored = time.perf_counter()
        learning_rate = self.student.learning_rate
        totals = self.student.compute_gradients(microbatches, signals)
        if math.isfinite(totals["loss"]):
            self.guards.check(step, totals, microbatches)
        elif not self.state.updates:
            raise UserError(
                f"step {step}: the loss is {totals['loss']} before the first update; look for broken weights"
            )
        grad_norm = self.update(step, totals)
        portability.synchronize()
        record = {
            "step": step,
            **summarize(totals, has_teacher=self.teacher is not None),
            "grad_norm": grad_norm,
            "skipped_steps": self.state.skipped_steps,
            "lr": learning_rate,
            **({"source": FROM_DATASET} if sampled is None else describe_rollouts(sampled, totals, sync_time)),
            "teacher_time_s": scored - rolled_out,
            "step_time_s": time.perf_counter() - start,
        }
        if probed is not None and record.get("mismatch_kl") is None:
            record["mismatch_kl"] = probed
        completions = None
        if sampled is not None and self.completions is not None:
            completions = self.completions.of_step(step, sampled, microbatches, self.student.token_divergence)
        self.write(record, completions)
        if not math.isfinite(totals["loss"]) or (grad_norm is not None and not math.isfinite(grad_norm)):
            self.reporter.message(f"step {step}: skipped: the loss or the gradient is not finite")
            self.bad_steps.record(step, totals["loss"], grad_norm, microbatches, self.student.mesh)

    def update(self, step: int, totals: dict[str, float]) -> float | None:
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
            if isinstance(self.teacher, FollowsStudent):
                self.teacher.after_update()
        self.state.step, self.state.is_updating = step, False
        return grad_norm

    def write(self, record: dict, completions: list[dict] | None) -> None:
        """Write a step's record. All ranks must call it: if the main rank can't write, all raise the UserError."""

        def write() -> None:
            self.reporter.step(record)
            warning = self.mismatch_warning.of_step(record["step"], record.get("mismatch_kl"))
            if warning is not None:
                self.reporter.message(warning)
            if completions is not None:
                self.reporter.completions(completions)

        run_on_all(write, os_error=f"output.output_dir = {self.exports.output_dir}: can't be written to")

    def validate(self, step: int) -> None:
        totals: dict[str, float] = {}
        for microbatches in self.validation:
            microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
            for name, value in self.student.evaluate(microbatches, self.score(microbatches)).items():
                totals[name] = totals.get(name, 0.0) + value
        record = summarize(totals, has_teacher=self.teacher is not None)
        self.reporter.validation({"step": step, **record})
        if self.checkpoints is not None:
            self.checkpoints.validation = step, record["loss" if self.teacher is None else "divergence"]

    def score(self, microbatches: list[Microbatch]) -> Sequence[TeacherSignal | None]:
        if self.teacher is None:
            return [None] * len(microbatches)
        with self.teacher.resident():
            return ReadOnce(self.teacher.score(microbatches))

    def export(self, folders: ExportFolders) -> ExportFolders:
        """Export the student as it is. All ranks must call it."""
        self.student.gather_parameters()
        self.reporter.message(f"exporting to {folders}")
        self.exports.claim(folders, is_main=self.student.mesh.is_main)
        if folders.adapters is not None:
            export_adapters(self.student.model, folders.adapters)
        if folders.checkpoint is not None:
            export_checkpoint(self.student.model, folders.checkpoint)
        return folders

    def save_checkpoint(self) -> bool:
        """Save a checkpoint of the run as it is, and wait for it. Returns False if it can't. All ranks must call it."""
        if self.checkpoints is None:
            return False
        return self.checkpoints.save(self.state.step) and self.checkpoints.finish()

    def export_now(self) -> ExportFolders:
        """Export the student as it is, before the run fails. All ranks must call it."""
        folders = self.export(self.exports.of_step(self.state.step))
        self.reporter.plot()
        return folders

"""The training loop, whole on one page."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import FROM_DATASET
from megatron_gkd.errors import ServiceFailed
from megatron_gkd.models.export import export_checkpoint
from megatron_gkd.runtime import portability
from megatron_gkd.teachers.base import FollowsStudent, TeacherSignal, TeacherSource
from megatron_gkd.training.ahead import announce_ahead
from megatron_gkd.training.completions import Completions
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.guards import Guards
from megatron_gkd.training.metrics import MismatchWarning, Reporter, describe_rollouts, summarize
from megatron_gkd.training.on_policy import RolloutReport, Rollouts
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
        completions: Completions | None = None,
        mismatch_kl_threshold: float | None = None,
        teacher_is_student: bool = False,
        train_iters: int,
        eval_interval: int | None,
        exports: Exports,
    ):
        self.student, self.teacher = student, teacher
        self.batches, self.validation, self.reporter = batches, validation, reporter
        self.rollouts, self.completions = rollouts, completions
        self.mismatch_warning = MismatchWarning(mismatch_kl_threshold)
        self.guards = Guards(
            student.objective.vocab_size,
            has_teacher=teacher is not None,
            same_as_teacher=student.model.config.params_dtype if teacher_is_student else None,
        )
        self.train_iters, self.eval_interval, self.exports = train_iters, eval_interval, exports
        self.steps_done = 0

    def run(self) -> Path:
        """Train to the end. Returns the directory of the final Hugging Face checkpoint.

        Raises ServiceFailed if a part of the run that lives elsewhere is gone for good; the student is exported before.
        """
        try:
            return self._run()
        except ServiceFailed as failure:
            raise ServiceFailed(self.rescue(failure)) from failure

    def _run(self) -> Path:
        for step, microbatches in enumerate(announce_ahead(self.batches, self.teacher), start=1):
            self.train_step(step, microbatches)
            self.steps_done = step
            last = step == self.train_iters
            if self.validation is not None and (last or (self.eval_interval and step % self.eval_interval == 0)):
                self.validate(step)
            if not last and self.exports.is_due(step):
                self.export(self.exports.step_directory(step))
                self.exports.forget_old(self.student.mesh.is_main)
        return self.export(self.exports.final_directory)

    def train_step(self, step: int, microbatches: list[Microbatch] | None) -> None:
        """One step, counted from 1. Without microbatches the student samples them."""
        start = time.perf_counter()
        sampled, sync_time = None, 0.0
        if microbatches is None:
            if not self.rollouts.has_begun(step - 1):
                sync_time += self.rollouts.load_weights(self.student, step - 1)
            microbatches, sampled = self.rollouts.microbatches(step - 1)
        if self.rollouts is not None and self.rollouts.is_early(step):  # the next one: `rollouts` counts from 0
            sync_time += self.rollouts.load_weights(self.student, step - 1)
            self.rollouts.begin(step)
        rolled_out = time.perf_counter()
        microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
        signals = self.score(microbatches)
        portability.synchronize()
        scored = time.perf_counter()
        learning_rate = self.student.learning_rate
        totals = self.student.compute_gradients(microbatches, signals)
        self.guards.check(step, totals, microbatches)
        grad_norm = self.student.update()
        if isinstance(self.teacher, FollowsStudent):
            self.teacher.after_update()
        portability.synchronize()
        record = {
            "step": step,
            **summarize(totals, has_teacher=self.teacher is not None),
            "grad_norm": grad_norm,
            "lr": learning_rate,
            **({"source": FROM_DATASET} if sampled is None else describe_rollouts(sampled, totals, sync_time)),
            "teacher_time_s": scored - rolled_out,
            "step_time_s": time.perf_counter() - start,
        }
        self.reporter.step(record)
        if sampled is not None:
            self.report_rollouts(record, sampled, microbatches)

    def report_rollouts(self, record: dict, sampled: RolloutReport, microbatches: list[Microbatch]) -> None:
        """What a step's record of numbers does not say about its samples."""
        warning = self.mismatch_warning.of_step(record["step"], record["mismatch_kl"])
        if warning is not None:
            self.reporter.message(warning)
        if self.completions is not None:
            divergence = self.student.token_divergence
            self.reporter.completions(self.completions.of_step(record["step"], sampled, microbatches, divergence))

    def validate(self, step: int) -> None:
        totals: dict[str, float] = {}
        for microbatches in self.validation:
            microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
            for name, value in self.student.evaluate(microbatches, self.score(microbatches)).items():
                totals[name] = totals.get(name, 0.0) + value
        self.reporter.validation({"step": step, **summarize(totals, has_teacher=self.teacher is not None)})

    def score(self, microbatches: list[Microbatch]) -> list[TeacherSignal | None]:
        if self.teacher is None:
            return [None] * len(microbatches)
        with self.teacher.resident():
            return self.teacher.score(microbatches)

    def export(self, directory: Path) -> Path:
        self.student.gather_parameters()
        self.reporter.message(f"exporting to {directory}")
        self.exports.claim(directory, is_main=self.student.mesh.is_main)
        return export_checkpoint(self.student.model, directory)

    def rescue(self, failure: ServiceFailed) -> str:
        """Export what has been learnt. Returns the failure with what there is and how to go on."""
        done = self.steps_done
        said = f"stopped after step {done} of {self.train_iters}: {failure}"
        if done == 0:
            return f"{said}\nNothing has been learnt yet, so nothing is exported"
        directory = self.export(self.exports.step_directory(done))
        self.reporter.plot()
        return (
            f"{said}\nThe student of step {done} is in {directory}. To go on from it, put the cause right and start "
            f"again with --model {directory} and another --output_dir"
        )

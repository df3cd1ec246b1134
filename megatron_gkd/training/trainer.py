"""The training loop, whole on one page."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

from megatron_gkd.data.loader import StepLoader
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import FROM_DATASET
from megatron_gkd.errors import UserError
from megatron_gkd.models.export import export_checkpoint
from megatron_gkd.runtime import portability
from megatron_gkd.teachers.base import TeacherSignal, TeacherSource
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.metrics import Reporter, describe_rollouts, summarize
from megatron_gkd.training.on_policy import Rollouts
from megatron_gkd.training.student import Student


class Trainer:
    """`teacher` None trains with plain cross-entropy. `validation` may be None.

    `rollouts` makes the steps for which `batches` has None.
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
        train_iters: int,
        eval_interval: int | None,
        exports: Exports,
    ):
        self.student, self.teacher = student, teacher
        self.batches, self.validation, self.reporter = batches, validation, reporter
        self.rollouts = rollouts
        self.train_iters, self.eval_interval, self.exports = train_iters, eval_interval, exports

    def run(self) -> Path:
        """Train to the end. Returns the directory of the final Hugging Face checkpoint."""
        for step, microbatches in enumerate(self.batches, start=1):
            self.train_step(step, microbatches)
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
        sampled = None
        if microbatches is None:
            if not self.rollouts.has_begun(step - 1):
                self.rollouts.load_weights(self.student, step - 1)
            microbatches, sampled = self.rollouts.microbatches(step - 1)
        if self.rollouts is not None and self.rollouts.is_early(step):  # the next one: `rollouts` counts from 0
            self.rollouts.load_weights(self.student, step - 1)
            self.rollouts.begin(step)
        rolled_out = time.perf_counter()
        microbatches = [microbatch.to(portability.device()) for microbatch in microbatches]
        signals = self.score(microbatches)
        portability.synchronize()
        scored = time.perf_counter()
        learning_rate = self.student.learning_rate
        totals = self.student.compute_gradients(microbatches, signals)
        if not math.isfinite(totals["loss"]):
            raise UserError(
                f"step {step}: the loss is {totals['loss']}; the weights keep their values of step {step - 1}"
            )
        grad_norm = self.student.update()
        portability.synchronize()
        self.reporter.step(
            {
                "step": step,
                **summarize(totals, has_teacher=self.teacher is not None),
                "grad_norm": grad_norm,
                "lr": learning_rate,
                **({"source": FROM_DATASET} if sampled is None else describe_rollouts(sampled, totals)),
                "teacher_time_s": scored - rolled_out,
                "step_time_s": time.perf_counter() - start,
            }
        )

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
        return export_checkpoint(self.student.model, directory)

"""The stages of an experiment: what they start from, the trainings, and the evaluation of each checkpoint."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from quickstart.rows import Row
from quickstart.stages import Runner, Stage
from quickstart.task import OUT, Task
from quickstart.training import Training


@dataclass(frozen=True)
class Plan:
    """What to train.

    Attributes:
        task: what the models learn.
        teacher: the recipe of the teacher, and the name of its folder.
        rows: the students.
        seeds: the seeds of each student.
    """

    task: Task
    teacher: str
    rows: Sequence[Row]
    seeds: range

    @property
    def teacher_run(self) -> Path:
        return OUT / self.teacher

    @property
    def runs(self) -> dict[str, list[Path]]:
        """The folders of each model's runs over the seeds."""
        students = {row.name: [_run_of(row, seed) for seed in self.seeds] for row in self.rows}
        return {"teacher": [self.teacher_run], **students}

    def run(self, runner: Runner) -> None:
        """Run all stages.

        Raises:
            subprocess.CalledProcessError: a training failed.
        """
        self._prepare(runner)
        self._train(runner)
        teacher = self.teacher_run / "hf"
        for run in itertools.chain(*self.runs.values()):
            inputs = [*self.task.evaluation_code, self.task.data / "test.jsonl", teacher, run / "hf"]
            work = partial(self._evaluate, run)
            runner.run(Stage(f"Evaluating {run.name} on the test split", inputs, run / "scores.json", work))

    def _prepare(self, runner: Runner) -> None:
        task = self.task
        runner.run(Stage("Writing problems", task.code, task.data, partial(task.write_data, task.data)))
        rows = task.data / "teacher_train.jsonl"
        work = partial(task.write_tokenizer, task.tokenizer, rows)
        runner.run(Stage("Training the tokenizer", [*task.code, rows], task.tokenizer, work))
        models = {"teacher": (task.teacher, 0)} | {f"student_seed{seed}": (task.student, seed) for seed in self.seeds}
        for name, (shape, seed) in models.items():
            folder = task.untrained / name
            work = partial(task.write_untrained, folder, task.tokenizer, shape, seed)
            runner.run(Stage(f"Initializing {name}", [*task.code, task.tokenizer], folder, work))

    def _train(self, runner: Runner) -> None:
        task = self.task
        start, rows = task.untrained / "teacher", task.data / "teacher_train.jsonl"
        runner.run(Training("Training the teacher", self.teacher, self.teacher_run, start, rows).stage())
        by_name = {row.name: row for row in self.rows}
        for seed, row in itertools.product(self.seeds, self.rows):
            start = task.untrained / f"student_seed{seed}"
            training = Training(
                f"Training a student: {row.name}" + (f", seed {seed}" if len(self.seeds) > 1 else ""),
                row.recipe,
                _run_of(row, seed),
                start if row.start is None else _run_of(by_name[row.start], seed) / "hf",
                task.data / f"{row.data}.jsonl",
                seed,
                teacher=self.teacher_run / "hf" if row.has_teacher else None,
                is_own_teacher=row.is_own_teacher,
            )
            runner.run(training.stage())

    def _evaluate(self, run: Path) -> None:
        import torch
        from transformers.utils import logging

        torch.set_num_threads(1)  # with more, threads that wait for a core beside other work take most of the time
        logging.disable_progress_bar()
        scores = self.task.evaluate(run / "hf", self.teacher_run / "hf", self.task.data)
        (run / "scores.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")


def _run_of(row: Row, seed: int) -> Path:
    return OUT / f"{row.recipe}_seed{seed}"

"""The quickstart and its experiment: bash scripts/quickstart.sh [--fresh] [--experiment ...].

A teacher learns arithmetic word problems from many correct solutions. A smaller student has few solutions, with wrong
calculations in them; it learns from them alone (cross-entropy), or from the teacher's distributions on the same rows
(GKD), from the same initial weights and for the same number of steps. Without options these are short runs of one seed.

--experiment trains longer, as for docs/results.md, from --seeds seeds. With --on-policy, the student of cross-entropy
continues in several ways (`rows.ON_POLICY`); with --self, a student is its own teacher (`rows.SELF`); with --lora, one
trains adapters, and another all parameters (`rows.LORA`). All are trained by `megatron_gkd train`.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.console import Console

from quickstart import prepare
from quickstart.rows import EXPERIMENT_TEACHER, QUICK, QUICK_TEACHER, Row, result_names, select_rows
from quickstart.stages import Runner, Stage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = Path("runs/quickstart")
DATA, UNTRAINED = OUT / "data", OUT / "untrained"
RECORDED = HERE / "results"
OF_EXPERIMENT = ("seeds", "on_policy", "self", "lora")


@dataclass(frozen=True)
class Plan:
    """What to train.

    Attributes:
        teacher: the recipe of the teacher, and the name of its folder.
        rows: the students.
        seeds: the seeds of each student.
    """

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


def main() -> None:
    """Run the quickstart's command line."""
    arguments = _parse()
    os.chdir(ROOT)
    console = Console()
    runner = Runner(OUT / "stages", console, arguments.fresh)
    plan = Plan(QUICK_TEACHER, QUICK, range(1, 2))
    if arguments.experiment:
        rows = select_rows(on_policy=arguments.on_policy, is_own_teacher=arguments.self, lora=arguments.lora)
        plan = Plan(EXPERIMENT_TEACHER, rows, range(1, (arguments.seeds or 1) + 1))
    try:
        _run(runner, plan)
    except subprocess.CalledProcessError as error:
        sys.exit(f"quickstart: training ended with exit code {error.returncode}")
    _report(console, plan, arguments.record)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__.split("\n\n")[1])
    parser.add_argument("--fresh", action="store_true", help="repeat the stages that are done already")
    parser.add_argument("--experiment", action="store_true", help="run the experiment of docs/results.md instead")
    parser.add_argument("--seeds", type=int, help="--experiment: number of seeds of each student (default 1)")
    parser.add_argument("--on-policy", action="store_true", help="--experiment: offline, mixed and on-policy students")
    parser.add_argument("--self", action="store_true", help="--experiment: a student that is its own teacher")
    parser.add_argument("--lora", action="store_true", help="--experiment: adapters against all parameters")
    parser.add_argument(
        "--record", action="store_true", help=f"write the table to {RECORDED.relative_to(ROOT)} as well"
    )
    arguments = parser.parse_args()
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"--seeds = {arguments.seeds}: must be at least 1")
    given = [name for name in OF_EXPERIMENT if getattr(arguments, name)]
    if given and not arguments.experiment:
        parser.error(f"--{given[0].replace('_', '-')}: needs --experiment")
    return arguments


def _run(runner: Runner, plan: Plan) -> None:
    _prepare(runner, plan.seeds)
    teacher = Training("Training the teacher", plan.teacher, plan.teacher_run, UNTRAINED / "teacher", "teacher_train")
    runner.run(teacher.stage())
    by_name = {row.name: row for row in plan.rows}
    for seed, row in itertools.product(plan.seeds, plan.rows):
        start = UNTRAINED / f"student_seed{seed}" if row.start is None else _run_of(by_name[row.start], seed) / "hf"
        training = Training(
            f"Training a student: {row.name}" + (f", seed {seed}" if len(plan.seeds) > 1 else ""),
            row.recipe,
            _run_of(row, seed),
            start,
            row.data,
            seed,
            teacher=plan.teacher_run / "hf" if row.has_teacher else None,
            is_own_teacher=row.is_own_teacher,
        )
        runner.run(training.stage())
    teacher_checkpoint = plan.teacher_run / "hf"
    for run in itertools.chain(*plan.runs.values()):
        inputs = [*_code("evaluate.py", "problems.py"), DATA / "test.jsonl", teacher_checkpoint, run / "hf"]
        work = partial(_evaluate, run, teacher_checkpoint)
        runner.run(Stage(f"Evaluating {run.name} on the test split", inputs, run / "scores.json", work))


def _prepare(runner: Runner, seeds: range) -> None:
    code = _code("problems.py", "prepare.py", "tokenizer.py")
    tokenizer = OUT / "tokenizer"
    runner.run(Stage("Writing problems", code, DATA, lambda: prepare.write_data(DATA)))
    runner.run(
        Stage(
            "Training the tokenizer",
            [*code, DATA / "teacher_train.jsonl"],
            tokenizer,
            lambda: prepare.write_tokenizer(tokenizer, DATA / "teacher_train.jsonl"),
        )
    )
    models = {"teacher": (prepare.TEACHER, 0)} | {f"student_seed{seed}": (prepare.STUDENT, seed) for seed in seeds}
    for name, (shape, seed) in models.items():
        work = _untrained(UNTRAINED / name, tokenizer, shape, seed)
        runner.run(Stage(f"Initializing {name}", [*code, tokenizer], UNTRAINED / name, work))


def _untrained(directory: Path, tokenizer: Path, shape: dict[str, int], seed: int) -> Callable[[], None]:
    return lambda: prepare.write_untrained(directory, tokenizer, shape, seed)


def _run_of(row: Row, seed: int) -> Path:
    return OUT / f"{row.recipe}_seed{seed}"


def _code(*names: str) -> list[Path]:
    return [HERE / name for name in names]


@dataclass(frozen=True)
class Training:
    """A run of the trainer. The recipe's own paths are those of seed 1.

    Attributes:
        title: the title of the stage.
        recipe: the name of the file in recipes/.
        output: the run's folder.
        start: the checkpoint that it starts from.
        rows: the name of the training file in data/.
        seed: the run's seed.
        teacher: the teacher's checkpoint; None if there is none.
        is_own_teacher: whether `start` is the teacher.
    """

    title: str
    recipe: str
    output: Path
    start: Path
    rows: str
    seed: int = 1
    teacher: Path | None = None
    is_own_teacher: bool = False

    def stage(self) -> Stage:
        """Return the stage that runs the trainer."""
        data = [DATA / f"{self.rows}.jsonl", DATA / "validation.jsonl"]
        teacher = [] if self.teacher is None else [self.teacher]
        inputs = [self._path, self.start, *data, *teacher, ROOT / "megatron_gkd", str(self.seed)]
        return Stage(self.title, inputs, self.output / "hf", self._train)

    @property
    def _path(self) -> Path:
        return HERE / "recipes" / f"{self.recipe}.yaml"

    def _train(self) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        overrides = ["--model", self.start, "--seed", self.seed, "--output_dir", self.output, "--save_interval", "null"]
        overrides += ["--teacher_model", self.start] if self.is_own_teacher else []
        command = [sys.executable, "-m", "megatron_gkd", "train", self._path, "--nproc", "2", *overrides]
        subprocess.run([str(part) for part in command], check=True)


def _evaluate(run: Path, teacher: Path) -> None:
    import torch
    from transformers.utils import logging

    from quickstart.evaluate import evaluate

    torch.set_num_threads(1)  # with more, threads that wait for a core beside other work take most of the time
    logging.disable_progress_bar()
    scores = evaluate(run / "hf", teacher, list(prepare.read_problems(DATA / "test.jsonl")))
    (run / "scores.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")


def _report(console: Console, plan: Plan, record: bool) -> None:
    from quickstart.evaluate import Scores
    from quickstart.report import draw, markdown_table, results_table

    runs = plan.runs
    results = {
        name: [Scores(**json.loads((run / "scores.json").read_text())) for run in group] for name, group in runs.items()
    }
    stem = f"{'_'.join(result_names(plan.rows))}_seeds{len(plan.seeds)}"
    table, curves = OUT / f"{stem}.md", OUT / "curves.png"
    draw({name: group[0] for name, group in runs.items()}, results, {row.name: row.color for row in plan.rows}, curves)
    table.write_text(markdown_table(results), encoding="utf-8")
    console.print()
    console.print(results_table(results, prepare.TEST_ROWS))
    console.print(f"curves        {curves}\ntable         {table}\ndata          {DATA}")
    for run in itertools.chain(*runs.values()):
        console.print(f"{'checkpoint':<14}{run / 'hf'}")
    if record:
        RECORDED.mkdir(exist_ok=True)
        shutil.copy(table, RECORDED)
        scores = {name: [asdict(score) for score in group] for name, group in results.items()}
        (RECORDED / f"{stem}.json").write_text(json.dumps(scores, indent=2) + "\n")
        console.print(f"recorded      {RECORDED.relative_to(ROOT) / table.name}")


if __name__ == "__main__":
    main()

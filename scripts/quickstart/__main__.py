"""The quickstart's experiment: bash scripts/quickstart.sh [--fresh] [--seeds N]

A teacher learns arithmetic word problems from many correct solutions. A smaller student has few, with slips in them;
it learns from them alone (cross-entropy), or from the teacher's distributions on the same rows (GKD), from the same
initial weights and for the same number of steps. All three are trained by `megatron_gkd train`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from quickstart import prepare
from quickstart.stages import Runner, Stage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = Path("runs/quickstart")
DATA, UNTRAINED = OUT / "data", OUT / "untrained"
TEACHER = OUT / "teacher"
STUDENTS = {"cross-entropy": "student_ce", "GKD": "student_gkd"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__.split("\n\n")[1])
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    parser.add_argument("--seeds", type=int, default=1, help="train the students from this many seeds (default 1)")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1")
    os.chdir(ROOT)
    console = Console()
    runner = Runner(OUT / "stages", console, arguments.fresh)
    try:
        _run(runner, console, range(1, arguments.seeds + 1))
    except subprocess.CalledProcessError as error:
        sys.exit(f"quickstart: training ended with exit code {error.returncode}")


def _run(runner: Runner, console: Console, seeds: range) -> None:
    _prepare(runner, seeds)
    runner.run(_training("Training the teacher", "teacher", TEACHER, UNTRAINED / "teacher", "teacher_train"))
    for seed in seeds:
        for name, recipe in STUDENTS.items():
            start = UNTRAINED / f"student_seed{seed}"
            title = f"Training a student with {name}" + (f", seed {seed}" if len(seeds) > 1 else "")
            teacher = [TEACHER / "hf"] if name == "GKD" else []
            runner.run(_training(title, recipe, _student(name, seed), start, "student_train", seed, teacher))
    checkpoints = {"teacher": [TEACHER]} | {name: [_student(name, seed) for seed in seeds] for name in STUDENTS}
    runs = [run for group in checkpoints.values() for run in group]
    inputs = [*_code("evaluate.py", "problems.py"), DATA / "test.jsonl", *(run / "hf" for run in runs)]
    runner.run(Stage("Evaluating on the test split", inputs, OUT / "scores.json", lambda: _evaluate(console, runs)))
    _report(console, checkpoints, seeds)


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
        runner.run(Stage(f"Initialising {name}", [*code, tokenizer], UNTRAINED / name, work))


def _untrained(directory: Path, tokenizer: Path, shape: dict[str, int], seed: int) -> Callable[[], None]:
    return lambda: prepare.write_untrained(directory, tokenizer, shape, seed)


def _student(name: str, seed: int) -> Path:
    return OUT / f"{STUDENTS[name]}_seed{seed}"


def _code(*names: str) -> list[Path]:
    return [HERE / name for name in names]


def _training(
    title: str, recipe: str, output: Path, start: Path, rows: str, seed: int = 1, teacher: list[Path] | None = None
) -> Stage:
    """A run of the trainer; the recipe's own paths are those of seed 1."""
    path = HERE / "recipes" / f"{recipe}.yaml"
    data = [DATA / f"{rows}.jsonl", DATA / "validation.jsonl"]
    inputs = [path, start, *data, *(teacher or []), ROOT / "megatron_gkd", str(seed)]

    def work() -> None:
        shutil.rmtree(output, ignore_errors=True)
        overrides = ["--model", start, "--seed", seed, "--output_dir", output]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "megatron_gkd", "train", path, *overrides]
        subprocess.run([str(part) for part in command], check=True)

    return Stage(title, inputs, output / "hf", work)


def _evaluate(console: Console, runs: list[Path]) -> None:
    import torch
    from transformers.utils import logging

    from quickstart.evaluate import evaluate

    torch.set_num_threads(os.cpu_count() or 1)
    logging.disable_progress_bar()
    problems = list(prepare.read_problems(DATA / "test.jsonl"))
    scores = {}
    for run in runs:
        with console.status(f"{run.name}: solving {len(problems)} problems"):
            scores[run.name] = asdict(evaluate(run / "hf", TEACHER / "hf", problems))
    (OUT / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")


def _report(console: Console, checkpoints: dict[str, list[Path]], seeds: range) -> None:
    from quickstart.evaluate import Scores
    from quickstart.report import draw, markdown_table, results_table

    scores = json.loads((OUT / "scores.json").read_text())
    results = {name: [Scores(**scores[run.name]) for run in runs] for name, runs in checkpoints.items()}
    table, curves = OUT / f"results_seeds{len(seeds)}.md", OUT / "curves.png"
    draw({name: runs[0] for name, runs in checkpoints.items()}, results, curves)
    table.write_text(markdown_table(results), encoding="utf-8")
    console.print()
    console.print(results_table(results, prepare.TEST_ROWS))
    console.print(f"curves        {curves}\ntable         {table}\ndata          {DATA}")
    for runs in checkpoints.values():
        for run in runs:
            console.print(f"{'checkpoint':<14}{run / 'hf'}")


if __name__ == "__main__":
    main()

"""The quickstart's experiment: bash scripts/quickstart.sh [--fresh] [--seeds N] [--on-policy] [--self] [--lora] ...

A teacher learns arithmetic word problems from many correct solutions. A smaller student has few, with slips in them;
it learns from them alone (cross-entropy), or from the teacher's distributions on the same rows (GKD), from the same
initial weights and for the same number of steps. With --on-policy, the student of cross-entropy goes on in several ways
(`rows.ON_POLICY`); with --self, a student is its own teacher (`rows.SELF`); with --lora, one trains adapters, and
another all parameters (`rows.LORA`). All are trained by `megatron_gkd train`.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from quickstart import prepare
from quickstart.rows import Row, names_of, rows_of
from quickstart.stages import Runner, Stage

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OUT = Path("runs/quickstart")
DATA, UNTRAINED = OUT / "data", OUT / "untrained"
TEACHER = OUT / "teacher"
RECORDED = HERE / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__.split("\n\n")[1])
    parser.add_argument("--fresh", action="store_true", help="do everything again")
    parser.add_argument("--seeds", type=int, default=1, help="train the students from this many seeds (default 1)")
    parser.add_argument("--on-policy", action="store_true", help="let students go on: offline, mixed and on-policy")
    parser.add_argument("--self", action="store_true", help="only a student that is its own teacher, with hints")
    parser.add_argument(
        "--lora", action="store_true", help="only a student that trains adapters, and one that does not"
    )
    parser.add_argument(
        "--record", action="store_true", help=f"write the table to {RECORDED.relative_to(ROOT)} as well"
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds {arguments.seeds}: must be at least 1")
    os.chdir(ROOT)
    console = Console()
    runner = Runner(OUT / "stages", console, arguments.fresh)
    try:
        rows = rows_of(on_policy=arguments.on_policy, is_own_teacher=arguments.self, lora=arguments.lora)
        _run(runner, console, rows, range(1, arguments.seeds + 1), arguments.record)
    except subprocess.CalledProcessError as error:
        sys.exit(f"quickstart: training ended with exit code {error.returncode}")


def _run(runner: Runner, console: Console, rows: Sequence[Row], seeds: range, record: bool) -> None:
    _prepare(runner, seeds)
    runner.run(_training("Training the teacher", "teacher", TEACHER, UNTRAINED / "teacher", "teacher_train"))
    by_name = {row.name: row for row in rows}
    for seed in seeds:
        for row in rows:
            start = UNTRAINED / f"student_seed{seed}" if row.start is None else _run_of(by_name[row.start], seed) / "hf"
            title = f"Training a student: {row.name}" + (f", seed {seed}" if len(seeds) > 1 else "")
            teacher = [TEACHER / "hf"] if row.has_teacher else []
            output = _run_of(row, seed)
            runner.run(_training(title, row.recipe, output, start, row.data, seed, teacher, row.is_own_teacher))
    runs = {"teacher": [TEACHER]} | {row.name: [_run_of(row, seed) for seed in seeds] for row in rows}
    for run in itertools.chain(*runs.values()):
        inputs = [*_code("evaluate.py", "problems.py"), DATA / "test.jsonl", TEACHER / "hf", run / "hf"]
        work = partial(_evaluate, run)
        runner.run(Stage(f"Evaluating {run.name} on the test split", inputs, run / "scores.json", work))
    _report(console, rows, runs, record)


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


def _run_of(row: Row, seed: int) -> Path:
    return OUT / f"{row.recipe}_seed{seed}"


def _code(*names: str) -> list[Path]:
    return [HERE / name for name in names]


def _training(
    title: str,
    recipe: str,
    output: Path,
    start: Path,
    rows: str,
    seed: int = 1,
    teacher: list[Path] | None = None,
    is_own_teacher: bool = False,
) -> Stage:
    """A run of the trainer; the recipe's own paths are those of seed 1."""
    path = HERE / "recipes" / f"{recipe}.yaml"
    data = [DATA / f"{rows}.jsonl", DATA / "validation.jsonl"]
    inputs = [path, start, *data, *(teacher or []), ROOT / "megatron_gkd", str(seed)]

    def work() -> None:
        shutil.rmtree(output, ignore_errors=True)
        overrides = ["--model", start, "--seed", seed, "--output_dir", output, "--save_interval", "null"]
        overrides += ["--teacher_model", start] if is_own_teacher else []
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "megatron_gkd", "train", path, *overrides]
        subprocess.run([str(part) for part in command], check=True)

    return Stage(title, inputs, output / "hf", work)


def _evaluate(run: Path) -> None:
    import torch
    from transformers.utils import logging

    from quickstart.evaluate import evaluate

    torch.set_num_threads(os.cpu_count() or 1)
    logging.disable_progress_bar()
    scores = evaluate(run / "hf", TEACHER / "hf", list(prepare.read_problems(DATA / "test.jsonl")))
    (run / "scores.json").write_text(json.dumps(asdict(scores), indent=2) + "\n")


def _report(console: Console, rows: Sequence[Row], runs: dict[str, list[Path]], record: bool) -> None:
    from quickstart.evaluate import Scores
    from quickstart.report import draw, markdown_table, results_table

    results = {
        name: [Scores(**json.loads((run / "scores.json").read_text())) for run in group] for name, group in runs.items()
    }
    stem = f"{'_'.join(names_of(rows))}_seeds{len(runs[rows[0].name])}"
    table, curves = OUT / f"{stem}.md", OUT / "curves.png"
    draw({name: group[0] for name, group in runs.items()}, results, {row.name: row.color for row in rows}, curves)
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

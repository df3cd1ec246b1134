"""The quickstart and its experiments: bash scripts/quickstart.sh [--fresh] [--experiment ... | --images].

A teacher learns arithmetic word problems from many correct solutions. A smaller student has few solutions, with wrong
calculations in them; it learns from them alone (cross-entropy), or from the teacher's distributions on the same rows
(GKD), from the same initial weights and for the same number of steps. Without options these are short runs of one seed.

--experiment trains longer, as for docs/results.md, from --seeds seeds. With --on-policy, the student of cross-entropy
continues in several ways (`rows.ON_POLICY`); with --self, a student is its own teacher (`rows.SELF`); with --lora, one
trains adapters, and another all parameters (`rows.LORA`). With --images, multimodal models learn to read drawn digits
instead, likewise from --seeds seeds (`rows.IMAGES`). All are trained by `megatron_gkd train`.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict

from rich.console import Console

from quickstart.images.task import IMAGES as READING_DIGITS
from quickstart.plan import Plan
from quickstart.rows import EXPERIMENT_TEACHER, IMAGES, IMAGES_TEACHER, QUICK, QUICK_TEACHER, result_names, select_rows
from quickstart.stages import Runner
from quickstart.task import HERE, OUT
from quickstart.training import ROOT
from quickstart.word_problems import WORD_PROBLEMS

RECORDED = HERE / "results"
OF_EXPERIMENT = ("on_policy", "self", "lora")


def main() -> None:
    """Run the quickstart's command line."""
    arguments = _parse()
    os.chdir(ROOT)
    console = Console()
    plan = _plan(arguments)
    try:
        plan.run(Runner(OUT / "stages", console, arguments.fresh))
    except subprocess.CalledProcessError as error:
        sys.exit(f"quickstart: training ended with exit code {error.returncode}")
    _report(console, plan, arguments.record)


def _plan(arguments: argparse.Namespace) -> Plan:
    seeds = range(1, (arguments.seeds or 1) + 1)
    if arguments.images:
        return Plan(READING_DIGITS, IMAGES_TEACHER, IMAGES, seeds)
    if arguments.experiment:
        rows = select_rows(on_policy=arguments.on_policy, is_own_teacher=arguments.self, lora=arguments.lora)
        return Plan(WORD_PROBLEMS, EXPERIMENT_TEACHER, rows, seeds)
    return Plan(WORD_PROBLEMS, QUICK_TEACHER, QUICK, seeds)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/quickstart.sh", description=__doc__.split("\n\n")[1])
    parser.add_argument("--fresh", action="store_true", help="repeat the stages that are done already")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--experiment", action="store_true", help="run the experiment of docs/results.md instead")
    kinds.add_argument("--images", action="store_true", help="run its experiment with images instead")
    parser.add_argument(
        "--seeds", type=int, help="--experiment and --images: number of seeds of each student (default 1)"
    )
    parser.add_argument("--on-policy", action="store_true", help="--experiment: offline, mixed and on-policy students")
    parser.add_argument("--self", action="store_true", help="--experiment: a student that is its own teacher")
    parser.add_argument("--lora", action="store_true", help="--experiment: adapters against all parameters")
    parser.add_argument(
        "--record", action="store_true", help=f"write the table to {RECORDED.relative_to(ROOT)} as well"
    )
    arguments = parser.parse_args()
    if arguments.seeds is not None and arguments.seeds < 1:
        parser.error(f"--seeds = {arguments.seeds}: must be at least 1")
    if arguments.seeds is not None and not (arguments.experiment or arguments.images):
        parser.error("--seeds: needs --experiment or --images")
    given = [name for name in OF_EXPERIMENT if getattr(arguments, name)]
    if given and not arguments.experiment:
        parser.error(f"--{given[0].replace('_', '-')}: needs --experiment")
    return arguments


def _report(console: Console, plan: Plan, record: bool) -> None:
    from quickstart.evaluate import Scores
    from quickstart.report import draw, markdown_table, results_table

    runs = plan.runs
    results = {
        name: [Scores(**json.loads((run / "scores.json").read_text())) for run in group] for name, group in runs.items()
    }
    stem = f"{'_'.join(result_names(plan.rows))}_seeds{len(plan.seeds)}"
    table, curves = plan.task.folder / f"{stem}.md", plan.task.folder / "curves.png"
    draw({name: group[0] for name, group in runs.items()}, results, {row.name: row.color for row in plan.rows}, curves)
    table.write_text(markdown_table(results), encoding="utf-8")
    console.print()
    console.print(results_table(results, plan.task.test_rows))
    console.print(f"curves        {curves}\ntable         {table}\ndata          {plan.task.data}")
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

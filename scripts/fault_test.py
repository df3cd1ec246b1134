"""Kill small training runs by SIGKILL at random points, continue them, and compare them with uninterrupted ones.

    python scripts/fault_test.py --kills 100 --output scripts/fault_test_results/kills100.json
    python scripts/fault_test.py --kills 20 --configs "MoE EP2" "steps_ahead 1" --seed 7

Each run has 40 steps in 2 processes and is killed up to ten times. At its end metrics.jsonl, completions.jsonl, what
TensorBoard shows, the exported weights and the checkpoints with their moments must be bit by bit those of a run that
was never killed, and nothing may be left behind. Exits with 1 where a run differs, and keeps that run's folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "scripts")]

from faults.configurations import CONFIGURATIONS  # noqa: E402
from faults.points import WEIGHTS  # noqa: E402
from faults.runs import FaultRuns, KillResult, RunResult  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

KILLS_PER_RUN = 10


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    disable_progress_bar()
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="fault-test-", dir=options.folder))
    results = [
        result
        for name, kills in shares(options.kills, options.configs).items()
        for result in test(name, kills, folder / name.replace(" ", "-"), options)
    ]
    made = sum(result.num_kills for result in results)
    exact = sum(result.num_kills for result in results if not result.problems)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table(results))
    console.print(f"{exact} of {made} bit-exact")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(as_json(results, options, time.monotonic() - start), indent=1) + "\n")
    if exact == made == options.kills and not any(result.problems for result in results):
        shutil.rmtree(folder)
        return 0
    console.print(f"the folders of the runs are in {folder}")
    return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="over all configurations (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="which points are drawn (default 0)")
    parser.add_argument("--configs", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME",
                        help=f"of {', '.join(CONFIGURATIONS)} (default all)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=40, help="of each run (default 40)")
    parser.add_argument("--first-run", type=int, default=1, help="number of each configuration's first run (default 1)")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    parser.add_argument("--folder", type=Path, help="for the runs (default: the system's temporary one)")
    return parser.parse_args(arguments)


def shares(kills: int, names: Sequence[str]) -> dict[str, int]:
    """Return how many kills each configuration gets; the first ones get one more where it does not come out even."""
    each, more = divmod(kills, len(names))
    return {name: each + (index < more) for index, name in enumerate(names) if each + (index < more)}


def test(name: str, kills: int, folder: Path, options: argparse.Namespace) -> list[RunResult]:
    """Make runs until `kills` kills have happened, or one fails."""
    made = 0

    def report(result: KillResult) -> None:
        nonlocal made
        made += 1
        where = f"resumed from step {result.resumed_from}, killed in step {result.where['step']}"
        print(f"{name} [{made}/{kills}] {result.kill.describe()}; {where}; {result.seconds:.1f} s", flush=True)

    runs = FaultRuns(name, folder, steps=options.steps, report=report)
    results: list[RunResult] = []
    number = options.first_run
    while made < kills:
        before, count = made, min(KILLS_PER_RUN, kills - made)
        results.append(runs.draw_and_run(number, count, options.seed))
        how = "differs" if results[-1].problems else "bit-exact"
        print(f"{name}, run {number}: {how} after {made - before} kills", flush=True)
        for missed in (one.kill for one in results[-1].kills if not one.happened):
            print(f"{name}, run {number}: it ended before this point: {missed.describe()}", flush=True)
        if results[-1].problems:
            print("\n".join(results[-1].problems))
            print(f"in {results[-1].folder}; again: python scripts/fault_test.py --configs {name!r} --kills {count} "
                  f"--first-run {number} --seed {options.seed} --steps {options.steps}", flush=True)  # fmt: skip
            break
        shutil.rmtree(results[-1].folder)
        number += 1
    return results


def table(results: Sequence[RunResult]) -> Table:
    """Return the table of kills by configuration and by what they interrupted."""
    found = Table(title="kills by what they interrupted")
    for column in ("configuration", *WEIGHTS, "kills", "bit-exact"):
        found.add_column(column, justify="left" if column == "configuration" else "right")
    for name in dict.fromkeys(result.configuration for result in results):
        own = [result for result in results if result.configuration == name]
        kinds = Counter(kill.kill.point.kind for result in own for kill in result.kills if kill.happened)
        exact = sum(result.num_kills for result in own if not result.problems)
        found.add_row(name, *(str(kinds[kind] or "") for kind in WEIGHTS), str(kinds.total()), str(exact))
    return found


def as_json(results: Sequence[RunResult], options: argparse.Namespace, seconds: float) -> dict:
    import torch
    from benchmarks.environment import describe

    versions = {name: metadata.version(name) for name in ("megatron-core", "mcore-bridge", "transformers")}
    return {
        "environment": describe(torch.device("cpu")) | {"packages": versions},
        "seed": options.seed,
        "steps": options.steps,
        "seconds": round(seconds),
        "kills": sum(result.num_kills for result in results),
        "bit_exact": sum(result.num_kills for result in results if not result.problems),
        "runs": [run_as_json(result) for result in results],
    }


def run_as_json(result: RunResult) -> dict:
    kills = [
        {
            "point": f"{one.kill.point.kind}: {one.kill.point.name}",
            "victims": "all ranks" if one.kill.is_everyone else f"rank {one.kill.rank}",
            "resumed_from": one.resumed_from,
            "killed_in_step": one.where["step"],
            "is_inside": one.where["is_inside"],
        }
        for one in result.kills
        if one.happened
    ]
    return {"configuration": result.configuration, "run": result.number, "kills": kills, "problems": result.problems}


if __name__ == "__main__":
    sys.exit(main())

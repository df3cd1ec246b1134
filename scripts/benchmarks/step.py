"""Whole offline steps: ours in one and two processes, TRL's GKDTrainer, torch.compile, and the floor.

    python scripts/benchmarks/step.py                                     # 15 minutes on 2 quiet cores
    python scripts/benchmarks/step.py --only "32k, packed"                # one case
    python scripts/benchmarks/step.py --output scripts/benchmarks/results && python scripts/write_docs_tables.py

All contestants have the same random weights, rows, AdamW and fp32, and do their steps in turn, each in processes of
its own with one thread. What a step costs at least is defined in `steps/floor.py`. TRL is measured if it is installed:

    pip install --no-deps --target peers trl accelerate && PYTHONPATH=peers python scripts/benchmarks/step.py

Results are saved after each case. The exit status is 1 where losses differ by more than 1e-4, since the contestants
then do different things, and where one of ours has not run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks.environment import describe, version
from benchmarks.steps import report
from benchmarks.steps.cases import CASES
from benchmarks.steps.contestants import ENTRIES
from benchmarks.steps.measure import Benchmark
from benchmarks.timing import Plan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=CASES, metavar="CASE", help="; ".join(CASES))
    parser.add_argument(
        "--who", nargs="+", default=list(ENTRIES), choices=ENTRIES, metavar="WHO", help="; ".join(ENTRIES)
    )
    parser.add_argument("--repeats", type=int, default=5, help="most measured steps of each")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each, after which two steps are enough")
    clock = "cpu: seconds of the processor, where other work disturbs; of two processes, those of the busier one"
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=clock)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    environment = describe(torch.device("cpu")) | {name: version(name) for name in ("megatron-core", "transformers")}
    run = {"environment": environment | {"threads": 1, "clock": arguments.clock}, "steps": []}
    plan = Plan(arguments.repeats, min(2, arguments.repeats), arguments.seconds)
    console = Console(width=None if sys.stdout.isatty() else 160)
    with tempfile.TemporaryDirectory(prefix="step_benchmark_") as root:
        benchmark = Benchmark(arguments.who, plan, Path(root), arguments.clock)
        try:
            for name in arguments.only:
                start = time.perf_counter()
                run["steps"].append(benchmark.measure(CASES[name]))
                report.write(run, arguments.output)
                console.print(report.case_section(run["steps"][-1]).rich())
                console.print(f"{time.perf_counter() - start:.0f} s")
        finally:
            benchmark.close()
    for section in report.summaries(run):
        console.print(section.rich())
    wrong = report.disagreements(run)
    for line in wrong:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""Measure rollouts: the embedded engine beside transformers' `generate` and vLLM, and steps that are sampled ahead.

    python scripts/benchmarks/rollout.py                                     # 4 minutes on 2 quiet cores
    python scripts/benchmarks/rollout.py --only "32k, mixed lengths"         # one case
    python scripts/benchmarks/rollout.py --output scripts/benchmarks/results && python scripts/write_docs_tables.py

All engines have the same random weights, prompts, lengths and fp32, and one thread. vLLM runs in a process of its own,
in the environment that `bash scripts/setup_vllm.sh` makes, or in that of MEGATRON_GKD_VLLM_PYTHON; without it, the
result names that command. Results are saved after each case.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in vLLM's process

import torch
from rich.console import Console

from benchmarks.environment import describe, version
from benchmarks.rollouts import ahead, report
from benchmarks.rollouts.cases import default_cases, save_models
from benchmarks.rollouts.engines import ENGINES, OURS
from benchmarks.rollouts.measure import Engines
from benchmarks.timing import Plan


def main() -> None:
    """Measure, print the tables, and write them."""
    cases = {case.name: case for case in default_cases()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(cases), choices=cases, metavar="CASE", help="; ".join(cases))
    parser.add_argument("--who", nargs="+", default=list(ENGINES), choices=ENGINES, metavar="ENGINE")
    parser.add_argument("--repeats", type=int, default=3, help="most measured requests of each engine")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each, after which one request is enough")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    environment = describe(torch.device("cpu")) | {name: version(name) for name in ("megatron-core", "transformers")}
    run = {"environment": environment, "rollouts": [], "ahead": []}
    plan = Plan(arguments.repeats, 1, arguments.seconds)
    names = [OURS, *(name for name in arguments.who if name != OURS)]
    console = Console(width=None if sys.stdout.isatty() else 160)
    run["ahead"] = ahead.measure(max(3, arguments.repeats))
    report.write(run, arguments.output)
    chosen = [cases[name] for name in arguments.only]
    with tempfile.TemporaryDirectory(prefix="rollout_benchmark_") as root:
        for vocab_size, model in save_models(chosen, Path(root)).items():
            start = time.perf_counter()
            engines = Engines(names, model)
            console.print(f"[dim]{vocab_size} ids: engines open after {time.perf_counter() - start:.0f} s")
            try:
                for case in (one for one in chosen if one.vocab_size == vocab_size):
                    start = time.perf_counter()
                    run["rollouts"].append(engines.measure(case, plan))
                    report.write(run, arguments.output)
                    console.print(f"[dim]{case.name}: {time.perf_counter() - start:.0f} s")
            finally:
                engines.close()
    for section in report.sections(run):
        console.print(section.rich())
    for name, why in report.missing(run).items():
        console.print(f"{name}: {why}")


if __name__ == "__main__":
    main()

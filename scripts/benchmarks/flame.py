"""Flame graph of our step in one process, and its time by kind of work.

    python scripts/benchmarks/flame.py --output scripts/benchmarks/results --picture docs/images/flame.svg    # 1 minute

Times are the medians of several profiled steps, path by path, with one thread. The profiler makes small operators
slower than they are.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.environment import describe, file_stem
from benchmarks.flame_graph import draw
from benchmarks.report import Section, headline
from benchmarks.steps.cases import CASES
from benchmarks.steps.profile import KINDS, Stack, kind_of, one_thread, profile_steps, totals

LEAST_S = 2e-5  # paths that take less are not kept
COLORS = dict(zip(KINDS, ("#9bc99b", "#f2b66d", "#a9b8dd", "#e9968a", "#d5d5d5"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default=next(iter(CASES)), metavar="CASE", help="; ".join(CASES))
    parser.add_argument("--steps", type=int, default=7, help="profiled steps")
    parser.add_argument("--top", type=int, default=15, help="operators to list, besides products")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    parser.add_argument("--picture", type=Path, default=None, help="SVG file; default: beside the results")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    with one_thread(), tempfile.TemporaryDirectory(prefix="flame_") as folder:
        environment = describe(torch.device("cpu"))
        times = profile_steps(case, Path(folder), arguments.steps)
    run = {
        "environment": environment,
        "case": case.name,
        "stacks": [[list(stack), round(seconds, 6)] for stack, seconds in times.items() if seconds > LEAST_S],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"{file_stem('flame', environment)}.json"
    path.write_text(json.dumps(run, separators=(",", ":")) + "\n")
    text = markdown(run, arguments.top)
    path.with_suffix(".md").write_text(text)
    title = f"A step of megatron_gkd, {case.name}: {sum(times.values()) * 1e3:.0f} ms; {headline(run)}"
    picture = draw(times, title, lambda stack: COLORS[kind_of(stack)], COLORS)
    (arguments.picture or path.with_suffix(".svg")).write_text(picture)
    print(text)


def markdown(run: dict, top: int) -> str:
    """Return the tables of a profile: time by kind, and the operators that take most besides products."""
    times: dict[Stack, float] = {tuple(stack): seconds for stack, seconds in run["stacks"]}
    whole = sum(times.values())
    kinds = [[kind, f"{1e3 * seconds:.1f}", f"{seconds / whole:.1%}"] for kind, seconds in totals(times).items()]
    columns = ("phase", *KINDS, "ms")
    phases: dict[str, dict[str, float]] = {}
    names: dict[tuple[str, str], float] = {}
    for stack, seconds in times.items():
        phase = next((name.removeprefix("gkd/") for name in stack if name.startswith("gkd/")), "other")
        kind = kind_of(stack)
        found = phases.setdefault(phase, dict.fromkeys(KINDS, 0.0))
        found[kind] += seconds
        if kind != KINDS[0]:
            names[phase, stack[-1]] = names.get((phase, stack[-1]), 0.0) + seconds
    rows = [
        [phase, *(f"{1e3 * found[kind]:.1f}" for kind in KINDS), f"{1e3 * sum(found.values()):.1f}"]
        for phase, found in phases.items()
    ]
    most = sorted(names.items(), key=lambda one: -one[1])[:top]
    operators = [[name, phase, f"{1e3 * seconds:.1f}"] for (phase, name), seconds in most]
    sections = (
        Section("Time of a step", ("kind of work", "ms", "share"), kinds),
        Section("By phase, ms", columns, rows),
        Section("What takes most beside products", ("operator or span", "phase", "ms"), operators),
    )
    head = f"## {run['case']}, {headline(run)}"
    return "\n".join([head, "", *(section.markdown() for section in sections)])


if __name__ == "__main__":
    main()

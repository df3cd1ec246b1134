"""Print the ratios between two results of one benchmark: what has become faster, slower, larger, smaller.

    python scripts/benchmarks/compare.py scripts/benchmarks/results/step_A.json runs/benchmarks/step_B.json

Every time that both files have is compared: medians of repetitions, B over A. Files of different benchmarks or devices
are refused. A ratio within one file holds on a machine that others use as well; one between two files holds only if
both were taken on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from benchmarks.report import Section

NAMES = ("case", "contestant", "name", "layout", "kernel", "beta", "peer", "model")
"""Keys whose values name an entry of a list."""
TIME = ("_s", "seconds", "_ms")


def kind_of(run: dict[str, Any]) -> tuple[str, ...]:
    """Return what a file is a result of: the names of its parts."""
    return tuple(sorted(key for key in run if key != "environment"))


def refusal(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Return why two results can't be compared; None where they can."""
    kinds = [", ".join(kind_of(run)) for run in (first, second)]
    if kinds[0] != kinds[1]:
        return f"results of different benchmarks: {kinds[0]} / {kinds[1]}; give two files of one"
    for key in ("device", "threads", "clock"):
        values = [run["environment"].get(key) for run in (first, second)]
        if values[0] != values[1]:
            return f"environment.{key} = {values[0]} / {values[1]}: must be the same; give two files of one {key}"
    return None


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield path and value of each figure below `value`; repetitions are one figure, their median."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key not in NAMES or isinstance(one, dict | list):
                yield from figures(one, (*path, key))
    elif isinstance(value, list):
        numbers = [one for one in value if _is_number(one)]
        if numbers and len(numbers) == len([one for one in value if one is not None]):
            yield path, float(median(numbers))
        else:
            for index, one in enumerate(value):
                yield from figures(one, (*path, _name(one, index)))
    elif _is_number(value):
        yield path, float(value)


def ratios(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[tuple[str, ...], float, float]]:
    """Return path and both values of each figure that two results have."""
    values = [dict(figures({key: run[key] for key in kind_of(run)})) for run in (first, second)]
    return [(path, value, values[1][path]) for path, value in values[0].items() if path in values[1]]


def section(first: dict[str, Any], second: dict[str, Any], *, everything: bool) -> Section:
    """Return the table of the ratios: of times, or of every figure."""
    rows = []
    for path, before, after in ratios(first, second):
        if (everything or path[-1].endswith(TIME)) and before:
            rows.append([" · ".join(path[1:]) or path[0], f"{before:.4g}", f"{after:.4g}", f"{after / before:.3f}"])
    title = " → ".join(f"{run['environment']['date']}, release {_release(run)}" for run in (first, second))
    return Section(f"{first['environment']['device']}: {title}", ("figure", "A", "B", "B / A"), rows)


def _release(run: dict[str, Any]) -> str:
    return run["environment"].get("release") or "unknown"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _name(entry: Any, index: int) -> str:
    if isinstance(entry, dict):
        named = [str(entry[key]) for key in NAMES if isinstance(entry.get(key), str | int | float)]
        if named:
            return ", ".join(named)
    return str(index)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="JSON file A")
    parser.add_argument("second", type=Path, help="JSON file B")
    parser.add_argument("--all", action="store_true", help="every figure, not times alone")
    arguments = parser.parse_args()
    first, second = (json.loads(path.read_text()) for path in (arguments.first, arguments.second))
    reason = refusal(first, second)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    table = section(first, second, everything=arguments.all)
    if not table.rows:
        print("the files have no figure in common; were the same cases measured?", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 160).print(table.rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables of whole steps, made from the JSON that `step.py` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environment import file_stem
from benchmarks.measure import OURS
from benchmarks.report import Section, headline
from benchmarks.steps.contestants import COMPILED, DP2, ENTRIES, FLOOR, PP2, TP2, TRL, TWO_THREADS

PHASES = ("teacher", "student", "head and loss", "optimizer")
NOTES = """\
Medians of steps in turn (one step where it takes over 15 s), fp32, each process with one thread. × ours: another's
time over that of one process of megatron_gkd; × floor: a time over that of the matrix products and the attention
alone, without the divergence, norms, activations and the optimizer; 2 threads, DP2, TP2 and PP2: the time of one
process with one thread over theirs, on two cores. In brackets: the goal. Memory: the peak of all processes' resident
memory, less that before the models were built. Shares: of the step's time; in others than ours the heads' products
count with student and teacher, and in all of them the backward pass with the student. Loss difference: the largest
relative one from ours over all steps that both have made, with adapters over the first, since their random factors
differ."""

MOST_LOSS_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Goal:
    """What a ratio of two contestants' times should be.

    Attributes:
        text: what is measured.
        slow: whose time is above.
        fast: whose time is below.
        least: the smallest ratio that reaches it by vocabulary; None where there is a largest one.
        most: the largest ratio that reaches it.
    """

    text: str
    slow: str
    fast: str
    least: dict[int, float] | None = None
    most: float | None = None

    def limit(self, case: dict[str, Any]) -> str:
        """Return the goal of a case for people."""
        return f"≤ {self.most:g}" if self.least is None else f"≥ {self._least(case):g}"

    def distance(self, case: dict[str, Any], value: float) -> str:
        """Return "reached", or by how much it is missed."""
        is_reached = value <= self.most if self.least is None else value >= self._least(case)
        wanted = self.most if self.least is None else self._least(case)
        return "reached" if is_reached else f"missed by {abs(value / wanted - 1):.0%}"

    def cell(self, case: dict[str, Any]) -> str:
        """Return what was measured, the goal, and the distance to it."""
        value = ratio(case, self.slow, self.fast)
        return "" if value is None else f"{_times(value)} ({self.limit(case)}: {self.distance(case, value)})"

    def _least(self, case: dict[str, Any]) -> float:
        return self.least.get(case["vocab"], min(self.least.values()))


GOALS = (
    Goal("TRL's time over ours", TRL, OURS, least={32000: 6.0, 151936: 10.0}),
    Goal("our time over the floor", OURS, FLOOR, most=1.25),
    Goal("one process on one core over DP2 on two", OURS, DP2, least={32000: 1.7, 151936: 1.7}),
)


def seconds(case: dict[str, Any], name: str) -> float | None:
    """Return the median seconds of a step; None where it has not run."""
    found = case["contestants"].get(name, {}).get("seconds")
    return median(found) if found else None


def ratio(case: dict[str, Any], slow: str, fast: str) -> float | None:
    """Return the time of `slow` over that of `fast`; None where either has not run."""
    above, below = seconds(case, slow), seconds(case, fast)
    return None if above is None or below is None else above / below


def loss_difference(case: dict[str, Any], name: str) -> float | None:
    """Return the largest relative difference from our losses; None where there are none."""
    team = ENTRIES[name].team
    mine, theirs = case["losses"].get(OURS, []), case["losses"].get(team, [])
    if name in (OURS, TWO_THREADS) or not mine or not theirs:
        return None
    steps = 1 if case["lora"] else min(len(mine), len(theirs))
    return max(abs(b / a - 1) for a, b in zip(mine[:steps], theirs[:steps], strict=True))


def disagreements(run: dict[str, Any]) -> list[str]:
    """Return a line for each contestant whose losses are not ours, and for each of ours that has not run."""
    found = []
    for case in run["steps"]:
        for name, entry in case["contestants"].items():
            if name.startswith(OURS) and entry["status"] != "ok":
                found.append(f"{case['case']}, {name}: {entry['status']}")
            difference = loss_difference(case, name)
            if difference is not None and not difference <= MOST_LOSS_DIFFERENCE:
                found.append(f"{case['case']}, {name}: losses differ from ours by {difference:.1e}")
    return found


def case_section(case: dict[str, Any]) -> Section:
    """Return the table of one case."""
    columns = ("step", "s", "tokens/s", "× ours", "× floor", "memory", *PHASES, "other", "loss difference")
    title = f"{case['case']}: {case['tokens']} tokens, {case['labels']} labels, {case['vocab']} ids"
    return Section(title, columns, [_row(case, name, len(columns)) for name in case["contestants"]])


def _row(case: dict[str, Any], name: str, columns: int) -> list[str]:
    found, taken = case["contestants"][name], seconds(case, name)
    if taken is None:
        why = f"{found['status']}: {found['install']}" if found["install"] else found["status"]
        return [f"{name} ({why})", *[""] * (columns - 1)]
    shares = [median(found["phases"][phase]) / taken if phase in found["phases"] else 0.0 for phase in PHASES]
    difference = loss_difference(case, name)
    return [
        name,
        f"{taken:.3g}",
        f"{case['tokens'] / taken:.4g}",
        _times(ratio(case, name, OURS)),
        _times(ratio(case, name, FLOOR)),
        _memory(found),
        *(f"{share:.0%}" for share in shares),
        f"{max(0.0, 1 - sum(shares)):.0%}",
        "" if difference is None else f"{difference:.0e}",
    ]


def summaries(run: dict[str, Any]) -> Iterator[Section]:
    """Return the tables over all cases: whole steps, and goals."""
    columns = ("step", "tokens/s", "TRL × ours", "ours × floor", "DP2", "torch.compile × ours", "TRL × floor")
    columns += ("2 threads", "TP2", "PP2", "memory", "memory of TRL")
    yield Section("Whole steps", columns, [_summary_row(case) for case in run["steps"]])
    columns = ("goal", "step", "wanted", "measured", "distance")
    yield Section("Goals", columns, [row for goal in GOALS for row in _goal_rows(run, goal)])


def _summary_row(case: dict[str, Any]) -> list[str]:
    taken = seconds(case, OURS)
    return [
        case["case"],
        "" if taken is None else f"{case['tokens'] / taken:.4g}",
        *(goal.cell(case) for goal in GOALS),
        _times(ratio(case, COMPILED, OURS)),
        _times(ratio(case, TRL, FLOOR)),
        *(_times(ratio(case, OURS, name)) for name in (TWO_THREADS, TP2, PP2)),
        *(_memory(case["contestants"].get(name, {})) for name in (OURS, TRL)),
    ]


def _goal_rows(run: dict[str, Any], goal: Goal) -> Iterator[list[str]]:
    for case in run["steps"]:
        value = ratio(case, goal.slow, goal.fast)
        found = ["", "not measured"] if value is None else [f"{value:.2f}", goal.distance(case, value)]
        yield [goal.text, case["case"], goal.limit(case), *found]


def markdown(run: dict[str, Any]) -> str:
    """Return all tables of a run."""
    load = f"load of {run['environment']['load_average']:.0f} before on {run['environment']['cpu_count']} cores"
    if run["environment"]["clock"] == "cpu":
        load += ", seconds of the processor"
    sections = [*summaries(run), *map(case_section, run["steps"])]
    return "\n".join([f"## {headline(run)}, {load}", "", NOTES, "", *(section.markdown() for section in sections)])


def write(run: dict[str, Any], output: Path) -> None:
    """Write a run as JSON and Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{file_stem('step', run['environment'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(run))


def _times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _memory(found: dict[str, Any]) -> str:
    peaks = [peak for peak in found.get("peak_bytes", []) if peak is not None]
    return f"{median(peaks) / 1e9:.2f} GB" if peaks else ""

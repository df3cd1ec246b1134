"""Tables of rollouts, made from the JSON that `rollout.py` writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.environment import file_stem
from benchmarks.report import Section, headline, seconds
from benchmarks.rollouts.engines import ENGINES, OURS

NOTES = """\
Medians of whole requests in turn, fp32, one thread each. × transformers, × vLLM: our tokens per second over theirs.
Equal: greedy completions that are the same as ours. Ahead: a step of `steps_ahead: 1` over the longer of its halves,
and over both in turn; the server sleeps."""
GOAL_AHEAD = 1.15


def rate(case: dict[str, Any], name: str) -> float | None:
    """Return an engine's tokens of completions per second; None where it did not run."""
    taken = seconds(case, name)
    return None if taken is None else case["contestants"][name]["tokens"] / taken


def sections(run: dict[str, Any]) -> Iterator[Section]:
    """Return the tables of a run."""
    others = [name for name in ENGINES if name != OURS]
    columns = ("rollout", "tokens", *(f"{name}, tokens/s" for name in ENGINES), *(f"× {name}" for name in others))
    yield Section("Rollouts", (*columns, *(f"equal, {name}" for name in others)), list(map(_row, run["rollouts"])))
    columns = ("step", "longer half, ms", "step, ms", "step / longer half", "step / both in turn")
    yield Section("Sampled one step ahead", columns, list(map(_ahead_row, run["ahead"])))


def _row(case: dict[str, Any]) -> list[str]:
    found = case["contestants"]
    others = [name for name in ENGINES if name != OURS]
    rates = {name: rate(case, name) if name in found else None for name in ENGINES}
    mine = rates[OURS]
    return [
        case["case"],
        str(found[OURS]["tokens"]),
        *("" if rates[name] is None else f"{rates[name]:.4g}" for name in ENGINES),
        *("" if mine is None or rates[name] is None else f"{mine / rates[name]:.2f}" for name in others),
        *(_equal(case, name) for name in others),
    ]


def _equal(case: dict[str, Any], name: str) -> str:
    found = case["contestants"].get(name, {})
    if not case["is_greedy"] or "equal_completions" not in found:
        return ""
    return f"{found['equal_completions']} of {case['prompts']}"


def _ahead_row(case: dict[str, Any]) -> list[str]:
    longer = max(median(case["rollout_half_s"]), median(case["training_half_s"]))
    state = "reached" if case["ratio"] <= GOAL_AHEAD else f"missed by {case['ratio'] / GOAL_AHEAD - 1:.0%}"
    return [
        case["case"],
        f"{longer * 1e3:.0f}",
        f"{median(case['step_s']) * 1e3:.0f}",
        f"{case['ratio']:.2f} (≤ {GOAL_AHEAD:g}: {state})",
        f"{case['ratio_in_turn']:.2f}",
    ]


def missing(run: dict[str, Any]) -> dict[str, str]:
    """Return why engines did not run, by name, with the command that installs them."""
    return {
        name: f"{one['status']}: {one['install']}" if one["install"] else one["status"]
        for case in run["rollouts"]
        for name, one in case["contestants"].items()
        if one["status"] != "ok"
    }


def markdown(run: dict[str, Any]) -> str:
    """Return all tables of a run."""
    absent = [f"- {name}: {why}" for name, why in missing(run).items()]
    return "\n".join([f"## {headline(run)}", "", NOTES, *absent, "", *(one.markdown() for one in sections(run))])


def write(run: dict[str, Any], output: Path) -> None:
    """Write a run as JSON and Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{file_stem('rollout', run['environment'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(run))

"""Steps of all contestants in one case, in turn."""

from __future__ import annotations

import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.steps.cases import Case
from benchmarks.steps.contestants import ENTRIES, TEAMS
from benchmarks.steps.team import Failed, Team
from benchmarks.timing import Plan, in_turn

SLOW_S = 15.0  # a first step that takes so long is the measurement: a cold start is little beside it


class Benchmark:
    """The teams, which are started when they are first needed.

    Args:
        names: of the entries to measure.
        plan: how often.
        root: for models and the processes' meeting places.
        clock: see `Team`.
    """

    def __init__(self, names: list[str], plan: Plan, root: Path, clock: str = "wall") -> None:
        self._names, self._plan, self._root, self._clock = names, plan, root, clock
        self._teams: dict[str, Team] = {}

    def measure(self, case: Case) -> dict[str, Any]:
        """Measure one case, and return its record for JSON."""
        folder = Path(tempfile.mkdtemp(prefix="models_", dir=self._root))
        case.save_models(folder)
        failures = self._build(case, folder)
        losses: dict[str, list[float]] = {}
        runs, samples = {}, {}
        for name in self._names:
            run = partial(self._attempt, name, losses, failures)
            first = run()  # compiles, and makes the optimizer's state
            if first is not None and first["seconds"] > SLOW_S and not ENTRIES[name].compiles:
                samples[name] = [first]
            elif first is not None:
                runs[name] = run
        samples |= in_turn(runs, self._plan)
        for team in {ENTRIES[name].team for name in self._names} - set(failures):
            self._teams[team].release()
        shutil.rmtree(folder)
        return {
            "case": case.name,
            "vocab": case.vocab,
            "tokens": case.tokens,
            "labels": case.labels,
            "lora": case.has_lora,
            "losses": losses,
            "contestants": {name: _record(samples.get(name), failures.get(ENTRIES[name].team)) for name in self._names},
        }

    def close(self) -> None:
        """End all processes."""
        for team in self._teams.values():
            team.close()

    def _build(self, case: Case, folder: Path) -> dict[str, Failed]:
        """Build all teams' models; return the teams that can't run."""
        failures: dict[str, Failed] = {}
        for name in dict.fromkeys(ENTRIES[name].team for name in self._names):
            plan = TEAMS[name]
            if name not in self._teams:
                root = self._root / name.replace(" ", "_").replace(",", "")
                self._teams[name] = Team(plan.module, plan.arguments, plan.processes, root, self._clock)
            try:
                self._teams[name].build(case, folder)
            except Failed as failure:
                self._lose(name, failure, failures)
        return failures

    def _lose(self, name: str, failure: Failed, failures: dict[str, Failed]) -> None:
        print(f"{name}: {failure}" + (f"; {failure.install}" if failure.install else ""), file=sys.stderr)
        failures[name] = failure
        self._teams.pop(name).close()

    def _attempt(self, name: str, losses: dict[str, list[float]], failures: dict[str, Failed]) -> dict[str, Any] | None:
        """Do a step of an entry; None where its team can't, now or before."""
        entry = ENTRIES[name]
        if entry.team in failures:
            return None
        try:
            return self._step(entry.team, entry.threads, losses)
        except Failed as failure:
            self._lose(entry.team, failure, failures)
            return None

    def _step(self, team: str, threads: int, losses: dict[str, list[float]]) -> dict[str, Any]:
        ranks = self._teams[team].step(threads)
        loss = next((rank.loss for rank in ranks if rank.loss is not None), None)
        if loss is not None:
            losses.setdefault(team, []).append(loss)
        peaks = [rank.peak_bytes for rank in ranks]
        phases = {name for rank in ranks for name in rank.phases}
        return {
            "seconds": max(rank.seconds for rank in ranks),
            "cpu_seconds": sum(rank.cpu_seconds for rank in ranks),
            "peak_bytes": None if None in peaks else sum(peaks),
            "phases": {name: sum(rank.phases.get(name, 0.0) for rank in ranks) / len(ranks) for name in sorted(phases)},
        }


def _record(samples: list[dict[str, Any] | None] | None, failure: Failed | None) -> dict[str, Any]:
    """Return one number a repetition."""
    samples = [sample for sample in samples or () if sample is not None]
    if failure is not None or not samples:
        return {"status": str(failure or "not run"), "install": "" if failure is None else failure.install}
    names = sorted({name for sample in samples for name in sample["phases"]})
    return {
        "status": "ok",
        "seconds": [sample["seconds"] for sample in samples],
        "cpu_seconds": [sample["cpu_seconds"] for sample in samples],
        "peak_bytes": [sample["peak_bytes"] for sample in samples],
        "phases": {name: [sample["phases"].get(name, 0.0) for sample in samples] for name in names},
    }

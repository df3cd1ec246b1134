"""Decide from the reports of all ranks whether a run hangs, and which ranks the others wait for."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_gkd.runtime.watchdog.report import Report

_SHOWN_RANKS = 4  # named with their phases; more are counted


@dataclass
class History:
    """The newest report of each rank, and when it was first seen here.

    Attributes:
        reports: by rank.
        seen_at: `time.monotonic()` of the first sight of each rank's newest report.
        began: when the first reports were added.
    """

    reports: dict[int, Report] = field(default_factory=dict)
    seen_at: dict[int, float] = field(default_factory=dict)
    began: float | None = None

    def add(self, reports: Iterable[Report], now: float) -> None:
        """Add what all ranks have published."""
        self.began = now if self.began is None else self.began
        for report in reports:
            known = self.reports.get(report.rank)
            if known is None or known.number != report.number:
                self.reports[report.rank], self.seen_at[report.rank] = report, now

    def unchanged_s(self, rank: int, now: float) -> float:
        """Return for how long this history has seen the same report of a rank."""
        return now - self.seen_at[rank]


@dataclass(frozen=True)
class Diagnosis:
    """A run that hangs.

    Attributes:
        hanging: reports of the ranks that the others wait for; empty where that is unknown.
        waiting: reports of the ranks that wait.
        silent_s: for how long each rank has made no progress.
        stopped: the ranks among `hanging` whose processes do not run.
    """

    hanging: tuple[Report, ...]
    waiting: tuple[Report, ...]
    silent_s: Mapping[int, float]
    stopped: frozenset[int]

    @property
    def step(self) -> int:
        """The step in which the run hangs."""
        return max(report.step for report in (*self.hanging, *self.waiting))

    @property
    def responding(self) -> tuple[int, ...]:
        """The ranks whose processes run."""
        return tuple(sorted(one.rank for one in (*self.hanging, *self.waiting) if one.rank not in self.stopped))

    def describe(self, world_size: int) -> str:
        """Return what hangs, in one line."""
        if not self.hanging:
            phases = _format_phases(self.waiting, self.silent_s)
            return f"the run hangs: all {world_size} ranks wait for each other, {phases}"
        named = [self._describe_rank(report, world_size) for report in self.hanging[:_SHOWN_RANKS]]
        more = len(self.hanging) - len(named)
        text = "; ".join(named) + (f"; and {more} more ranks" if more else "")
        if self.waiting:
            text += f"; the other ranks wait, {_format_phases(self.waiting, self.silent_s)}"
        return text

    def _describe_rank(self, report: Report, world_size: int) -> str:
        subject = f"rank {report.rank} of {world_size} on {report.host} (process {report.pid}) hangs"
        text = f"{subject}: {_format_phase(report)}, no progress for {self.silent_s[report.rank]:.0f} s"
        if report.rank in self.stopped:
            at = time.strftime("%H:%M:%S", time.localtime(report.time))
            text += f"; its process is stopped or does not get to run, last sign of life at {at}"
        return text


def diagnose(history: History, limit: float, interval: float, now: float) -> Diagnosis | None:
    """Return what hangs; None as long as a rank may make progress.

    Args:
        history: of the reports of all ranks.
        limit: seconds without progress that are allowed.
        interval: seconds between two reports of a rank.
        now: `time.monotonic()`.
    """
    observed = 5 * interval
    if history.began is None or now - history.began < observed:
        return None
    is_running = {rank: history.unchanged_s(rank, now) < observed for rank in history.reports}
    silent_s = {rank: _silent_s(history, rank, is_running, now) for rank in history.reports}
    if any(seconds < limit for seconds in silent_s.values()):
        return None
    stopped = frozenset(rank for rank, runs in is_running.items() if not runs)
    reports = [history.reports[rank] for rank in sorted(history.reports)]
    hanging = _select_hanging(reports, stopped)
    waiting = tuple(report for report in reports if report not in hanging)
    return Diagnosis(tuple(hanging), waiting, silent_s, stopped)


def _silent_s(history: History, rank: int, is_running: Mapping[int, bool], now: float) -> float:
    """Return the seconds since a rank's last progress; of a process that does not run, since its last report."""
    report = history.reports[rank]
    if is_running[rank]:
        return report.silent_s + history.unchanged_s(rank, now) if report.silent_s else 0.0
    # The rank before knows for how long: this history may be younger. Neighbors that stopped together are on one node.
    observer = rank
    for _ in history.reports:
        observer = (observer - 1) % len(history.reports)
        if is_running[observer]:
            return max(history.unchanged_s(rank, now), history.reports[observer].next_is_silent_s)
    return history.unchanged_s(rank, now)


def _select_hanging(reports: Sequence[Report], stopped: frozenset[int]) -> list[Report]:
    """Return the ranks that the others wait for: by their processes, their phases, their threads, their collectives."""
    if stopped:
        return [report for report in reports if report.rank in stopped]
    furthest_back = [report for report in reports if report.changes == min(one.changes for one in reports)]
    if len(furthest_back) < len(reports):
        return furthest_back
    busy = [report for report in reports if report.is_waiting is False]
    if len(reports) == 1 or (busy and len(busy) < len(reports)):
        return busy or list(reports)
    return [report for report in reports if _is_behind(report, reports)]


def _is_behind(report: Report, reports: Sequence[Report]) -> bool:
    """Return whether another rank has begun a later collective of a process group that both are members of."""
    own = report.collectives or {}
    return any(
        number > own[group] for other in reports for group, number in (other.collectives or {}).items() if group in own
    )


def _format_phase(report: Report) -> str:
    return f"phase {report.phase} of step {report.step}" if report.step else f"phase {report.phase}"


def _format_phases(reports: Sequence[Report], silent_s: Mapping[int, float]) -> str:
    phases = list(dict.fromkeys(map(_format_phase, reports)))
    longest = max(silent_s[report.rank] for report in reports)
    more = f" and {len(phases) - 3} others" if len(phases) > 3 else ""
    return f"for {longest:.0f} s, in {', '.join(phases[:3])}{more}"

"""Who does whole steps, in how many processes and threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.measure import OURS

FLOOR, TRL, COMPILED, TWO_THREADS = "floor", "TRL GKDTrainer", "torch.compile", f"{OURS}, 2 threads"
DP2, TP2, PP2 = (f"{OURS}, {layout}" for layout in ("DP2", "TP2", "PP2"))


@dataclass(frozen=True)
class TeamPlan:
    """A contestant's processes.

    Attributes:
        module: of this package.
        processes: their number; each has one thread.
        arguments: of the module's `Contestant`.
    """

    module: str
    processes: int = 1
    arguments: dict[str, Any] = field(default_factory=dict)


def _ours(processes: int = 1, **parallel: Any) -> TeamPlan:
    return TeamPlan("ours", processes, {"parallel": parallel})


TEAMS = {
    OURS: _ours(),
    DP2: _ours(2),
    TP2: _ours(2, tensor_model_parallel_size=2, sequence_parallel=True),
    PP2: _ours(2, pipeline_model_parallel_size=2),
    TRL: TeamPlan("trl"),
    COMPILED: TeamPlan("compiled"),
    FLOOR: TeamPlan("floor"),
}


@dataclass(frozen=True)
class Entry:
    """A line of the tables.

    Attributes:
        team: its processes.
        threads: of each of them.
        compiles: whether the first step compiles.
    """

    team: str
    threads: int = 1
    compiles: bool = False

    @property
    def cores(self) -> int:
        """Cores that it keeps busy."""
        return TEAMS[self.team].processes * self.threads


ENTRIES = {
    OURS: Entry(OURS),
    TWO_THREADS: Entry(OURS, threads=2),
    DP2: Entry(DP2),
    TP2: Entry(TP2),
    PP2: Entry(PP2),
    COMPILED: Entry(COMPILED, compiles=True),
    TRL: Entry(TRL),
    FLOOR: Entry(FLOOR),
}

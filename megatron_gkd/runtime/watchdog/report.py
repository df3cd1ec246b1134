"""What a rank publishes of itself, and why a run ends, as texts for the store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Self


@dataclass(frozen=True)
class Report:
    """What a rank publishes of itself.

    Attributes:
        rank: of the process.
        host: the name of its node.
        pid: its process id there.
        number: of this report, from 1; the process runs as long as it rises.
        time: of day, in seconds since the epoch by the host's clock.
        phase: see `PhaseMark`.
        step: see `PhaseMark`.
        changes: see `PhaseMark`.
        silent_s: seconds since its last progress; 0 in a phase without a limit.
        next_is_silent_s: for how long the reports of the next rank have not changed, as this rank sees it.
        is_waiting: whether its main thread waits for other ranks; None where it was not looked at.
        collectives: number of the newest collective of each process group, where torch records them.
    """

    rank: int
    host: str
    pid: int
    number: int
    time: float
    phase: str
    step: int
    changes: int
    silent_s: float
    next_is_silent_s: float = 0.0
    is_waiting: bool | None = None
    collectives: dict[str, int] | None = None

    def encode(self) -> str:
        """Return the report as text."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """Return the report from what `encode` returned."""
        return cls(**json.loads(text))


class EndKind(Enum):
    """Why a run ends in all ranks."""

    HANG = "hang"
    FAILURE = "failure"


@dataclass(frozen=True)
class End:
    """The end of a run that one rank has found.

    Attributes:
        kind: a hang, or the failure of a rank.
        message: for the user, in one line.
        code: the exit code of all ranks.
        step: the step that the run was in.
        hanging: the ranks that hang; the rank that failed.
        responding: the ranks whose processes run.
    """

    kind: EndKind
    message: str
    code: int
    step: int = 0
    hanging: tuple[int, ...] = ()
    responding: tuple[int, ...] = ()

    def encode(self) -> str:
        """Return the end as text."""
        return json.dumps(asdict(self) | {"kind": self.kind.value})

    @classmethod
    def decode(cls, text: bytes) -> Self:
        """Return the end from what `encode` returned."""
        values = json.loads(text)
        ranks = {name: tuple(values[name]) for name in ("hanging", "responding")}
        return cls(**values | ranks | {"kind": EndKind(values["kind"])})

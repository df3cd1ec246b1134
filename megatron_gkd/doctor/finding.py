"""What a check finds, and the checks' common form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_gkd.doctor.subject import Subject

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: what was checked; stable over releases, for programs that read the report.
        status: failed where a run would fail, warning where it may, or is slower than it need be.
        text: what was found.
        remedy: what to do; empty where nothing is to be done.
    """

    name: str
    status: Status
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Check:
    """A check of the machine.

    Attributes:
        name: of the finding that says that the check itself did not end.
        find: yields what is found.
        seconds: longest time that it may take.
        late: status of a check that does not end in that time.
    """

    name: str
    find: Callable[[Subject], Iterator[Finding]]
    seconds: float = 20.0
    late: Status = "failed"

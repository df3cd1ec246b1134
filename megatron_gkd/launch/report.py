"""The launcher's one report of a failed run, and its exit code."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from megatron_gkd.errors import GkdError, Interrupted
from megatron_gkd.launch.failures import Failure
from megatron_gkd.runtime.lost_peers import is_of_lost_peer

INTERRUPTED = Interrupted.exit_code


class Stop(Enum):
    """Why the launcher ended a rank."""

    FAILURE_ELSEWHERE = "another rank failed"
    TIMEOUT = "it did not end in time after a signal"


@dataclass(frozen=True)
class End:
    """The end of a rank's process.

    Attributes:
        code: exit code, or minus the number of the signal that killed it.
        rank: its global rank.
        time: seconds since the epoch, of its failure or else of its end.
        failure: what it reported; None if it ended without a report.
        stopped: why the launcher killed it; None if it did not.
        forwarded: the signal, received by the launcher and forwarded, that ended it; 0 for none.
        lacked_memory: whether the kernel of this node has killed a process for lack of memory meanwhile.
    """

    rank: int
    code: int
    time: float
    failure: Failure | None = None
    stopped: Stop | None = None
    forwarded: int = 0
    lacked_memory: bool = False

    @property
    def is_interruption(self) -> bool:
        """Whether a signal to the launcher ended the rank, saved or not."""
        return (self.code == INTERRUPTED and not self.is_hang) or self.forwarded != 0

    @property
    def is_hang(self) -> bool:
        """Whether the rank has ended since the run hangs."""
        return self.failure is not None and self.failure.kind == "hang"

    @property
    def is_consequence(self) -> bool:
        """Whether the rank most likely failed since another one did."""
        if self.failure is None:
            return self.stopped is Stop.FAILURE_ELSEWHERE
        if self.failure.kind != "failure":
            return self.failure.kind == "consequence"
        # A message with an exit code of its own is for the user: what it says of a connection is about a server.
        is_unexpected = self.failure.traceback is not None or self.failure.code == GkdError.exit_code
        return is_unexpected and is_of_lost_peer(self.failure.message)


def causes(ends: Iterable[End]) -> list[End]:
    """Return the ends that are failures, the likely cause first."""
    failed = [end for end in ends if end.code != 0 and not end.is_interruption]
    return sorted(failed, key=lambda end: (not end.is_hang, end.is_consequence, end.time, end.rank))


def exit_code(ends: Sequence[End]) -> int:
    """Return the launcher's exit code: the first failing rank's, as a shell has it; else 75 for an interruption."""
    failed = causes(ends)
    if failed:
        code = failed[0].code
        return code if code > 0 else 128 - code
    return INTERRUPTED if any(end.code for end in ends) else 0


def describe(ends: Sequence[End], world_size: int, timeout: float = 0, *, is_explained: bool = False) -> str:
    """Return the report: each distinct message once, with its ranks, the likely cause first; empty if none failed.

    Args:
        ends: the ends of this node's ranks.
        world_size: the number of all ranks.
        timeout: seconds that ranks had to end after a signal.
        is_explained: the cause is known, and not among `ends`.
    """
    by_text: dict[tuple[str, str | None], list[End]] = {}
    reported = causes(ends) or [end for end in ends if end.forwarded or (end.code and end.failure)]
    is_explained = is_explained or any(not end.is_consequence for end in reported)
    for end in reported:
        by_text.setdefault(_text(end, timeout, is_explained=is_explained), []).append(end)
    lines, printed = [], set()
    for (message, traceback), group in by_text.items():
        if message not in printed:
            lines.append(_line(message, group, world_size))
            printed.add(message)
        if traceback is not None:
            lines.append(traceback.rstrip())
    return "\n".join(lines)


def _text(end: End, timeout: float, *, is_explained: bool) -> tuple[str, str | None]:
    if end.forwarded:
        return f"ended by {_signal_name(end.forwarded)} before saving was possible", None
    if end.is_consequence and is_explained:
        return "stopped, or lost the connection, after that", None
    if end.failure is not None:
        return end.failure.message, end.failure.traceback
    if end.stopped is Stop.TIMEOUT:
        return f"was killed for not ending within {timeout:g} s after a signal (--shutdown-timeout)", None
    if end.stopped is Stop.FAILURE_ELSEWHERE:
        return "stopped by the launcher", None
    if end.code < 0:
        return f"was killed by {_signal_name(-end.code)}{_hint(end)}", None
    return f"ended with exit code {end.code} without a message", None


def _hint(end: End) -> str:
    if end.code != -signal.SIGKILL:
        return ""
    if end.lacked_memory:
        return " (out of memory: the kernel has killed a process of this node for lack of host memory)"
    return " (out of memory?)"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _line(message: str, group: Sequence[End], world_size: int) -> str:
    """Return a message with its ranks; without them where it is one of the whole run."""
    subject = f"rank{'' if len(group) == 1 else 's'} {format_ranks(end.rank for end in group)} of {world_size}"
    failure = group[0].failure
    if failure is None or failure.message != message:
        return f"{subject} {message if len(group) == 1 else re.sub('^was ', 'were ', message)}"
    return message if failure.is_shared or len(group) == world_size else f"{subject}: {message}"


def format_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as ranges: "0, 2-5"."""
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][1] + 1:
            ranges[-1][1] = rank
        else:
            ranges.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)

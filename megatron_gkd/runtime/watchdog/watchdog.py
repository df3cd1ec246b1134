"""The threads of a rank that publish its report, look for the end of the run, and end the process then."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_gkd.errors import Interrupted
from megatron_gkd.runtime.current_phase import current_mark, note_progress, seconds_without_progress
from megatron_gkd.runtime.watchdog.board import Board
from megatron_gkd.runtime.watchdog.diagnosis import Diagnosis, History, diagnose
from megatron_gkd.runtime.watchdog.evidence import is_waiting_for_others, newest_collectives, write_evidence
from megatron_gkd.runtime.watchdog.report import End, EndKind, Report

LONGEST_INTERVAL_S = 2.0  # between two reports
FAILS_BY_ITSELF_S = 3.0  # after the failure of another rank, until a rank that waits for it is ended
LOST_S = 10.0  # after the end of the process with the store, until a rank that waits is ended
SENT_WITHIN_S = 5.0  # the announcement of a failure
CLOSES_WITHIN_S = 10.0  # ranks end together, as a rule
EVIDENCE_WITHIN_S = 10.0  # a rank waits so long for the others to write their stacks

Leave = Callable[[End, bool], None]
"""Ends this process. The second argument: whether it is the rank that records the end for the run."""


@dataclass(frozen=True)
class Limits:
    """The time limits of a watchdog.

    Attributes:
        seconds: longest time without progress; None: no limit, and only failures end the run.
    """

    seconds: float | None

    @property
    def interval(self) -> float:
        """Seconds between two reports."""
        return LONGEST_INTERVAL_S if self.seconds is None else min(LONGEST_INTERVAL_S, self.seconds / 10)


class Watchdog:
    """Watch this rank together with the watchdogs of all others.

    Args:
        board: shared with the other ranks, and used by nothing else here.
        rank: of this process.
        limits: on the time without progress.
        folder: for the stacks of ranks that hang.
        leave: ends this process; called from a thread.
    """

    def __init__(self, board: Board, rank: int, limits: Limits, folder: Path, leave: Leave) -> None:
        self._board, self._rank, self._limits, self._folder, self._leave = board, rank, limits, folder, leave
        self._number, self._exchanged_at = 0, time.monotonic()
        self._next = History()
        self._all: History | None = None
        self._ticket: int | None = None
        self._failure: End | None = None
        self._lost_at: float | None = None
        self._closed, self._wake, self._is_leaving = threading.Event(), threading.Event(), threading.Lock()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("watchdog", self._exchange_reports), ("watchdog of the store", self._watch_store))
        ]

    def start(self) -> None:
        """Start the threads. The time until then, in which the processes have met, does not count."""
        note_progress()
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stop: this rank has nothing left to do with the others. Rank 0, which may hold the store, waits for them."""
        self._closed.set()
        self._wake.set()
        self._threads[0].join(CLOSES_WITHIN_S)

    def announce_failure(self, message: str, code: int) -> None:
        """Let the other ranks end: this one fails alone, and leaves. Called by the thread that fails."""
        end = End(EndKind.FAILURE, message, code, current_mark().step, (self._rank,))
        self._failure = end
        self._wake.set()
        self._threads[0].join(SENT_WITHIN_S)

    # The thread that communicates.

    def _exchange_reports(self) -> None:
        try:
            while not self._closed.is_set():
                self._wake.wait(self._limits.interval)
                if self._failure is not None:
                    self._board.announce(self._failure)
                    return
                if not self._closed.is_set():
                    self._exchange()
            self._wait_for_all_to_close()
        except dist.DistError:  # the process with the store has ended; see `_watch_store`
            self._lost_at = time.monotonic()

    def _wait_for_all_to_close(self) -> None:
        deadline, own = time.monotonic() + CLOSES_WITHIN_S, 1
        while self._board.count("closed", mine=own) < self._board.world_size:
            if self._rank != 0 or time.monotonic() >= deadline:
                return
            own = 0
            time.sleep(0.02)

    def _exchange(self) -> None:
        is_suspect = self._limits.seconds is not None and self._silent_s() >= self._limits.seconds
        self._board.publish(self._make_report(is_suspect=is_suspect))
        self._observe_next()
        end = self._board.find_end()
        if end is None and is_suspect:
            end = self._investigate()
        elif end is None:
            self._all = None
        self._exchanged_at = time.monotonic()
        if end is not None:
            self._end(end)

    def _make_report(self, *, is_suspect: bool) -> Report:
        mark = current_mark()
        self._number += 1
        neighbor = (self._rank + 1) % self._board.world_size
        unchanged_s = self._next.unchanged_s(neighbor, time.monotonic()) if neighbor in self._next.seen_at else 0.0
        return Report(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._number,
            time=time.time(),
            phase=mark.phase,
            step=mark.step,
            changes=mark.changes,
            silent_s=self._silent_s(),
            next_is_silent_s=unchanged_s,
            is_waiting=is_waiting_for_others() if is_suspect else None,
            collectives=newest_collectives() if is_suspect else None,
        )

    def _silent_s(self) -> float:
        return seconds_without_progress() if current_mark().is_limited else 0.0

    def _observe_next(self) -> None:
        report = self._board.read((self._rank + 1) % self._board.world_size)
        if report is not None:
            self._next.add([report], time.monotonic())

    def _investigate(self) -> End | None:
        """Look at the reports of all ranks, if it is this rank's turn; return the end of a run that hangs."""
        seconds, interval = self._limits.seconds or 0.0, self._limits.interval
        if self._ticket is None:
            self._ticket = self._board.take_ticket()
        # Only one rank looks, as a rule. It may stop itself: then the one with the next ticket does.
        if self._silent_s() < seconds + (self._ticket - 1) * 10 * interval:
            return None
        reports = self._board.read_all()
        if reports is None:
            return None
        self._all = self._all or History()
        self._all.add(reports, time.monotonic())
        found = diagnose(self._all, seconds, interval, time.monotonic())
        return None if found is None else self._board.announce(self._end_of(found))

    def _end_of(self, found: Diagnosis) -> End:
        message = f"{found.describe(self._board.world_size)} (cluster.watchdog_s = {self._limits.seconds:g})"
        hanging = tuple(report.rank for report in found.hanging)
        return End(EndKind.HANG, message, Interrupted.exit_code, found.step, hanging, found.responding)

    def _end(self, end: End) -> None:
        """End this process, in which nothing else may do so any more."""
        if end.kind is EndKind.FAILURE and not self._waits_for_failed(end):
            return
        if not self._is_leaving.acquire(blocking=False):
            return
        if end.kind is EndKind.HANG:
            self._write_evidence(end)
            with contextlib.suppress(dist.DistError):
                self._wait_for_evidence(end)
        self._leave(end, self._rank == min(end.responding, default=0))

    def _waits_for_failed(self, end: End) -> bool:
        """Return whether this rank, which has time to fail by itself, goes on waiting."""
        if self._rank in end.hanging:
            return False
        deadline = time.monotonic() + FAILS_BY_ITSELF_S
        while time.monotonic() < deadline:
            if self._closed.wait(0.05) or self._failure is not None or current_mark().is_ending:
                return False
        return True

    def _write_evidence(self, end: End) -> None:
        with contextlib.suppress(OSError):
            write_evidence(self._folder / f"step-{end.step}", self._rank, end.message)

    def _wait_for_evidence(self, end: End) -> None:
        """Wait until all ranks have written theirs: the launcher ends those that are left when the first one leaves."""
        deadline, own = time.monotonic() + EVIDENCE_WITHIN_S, 1
        while self._board.count("evidence", mine=own) < len(end.responding) and time.monotonic() < deadline:
            own = 0
            time.sleep(max(0.05, self._board.world_size / 5000))  # few calls of the store on many ranks

    # The thread that watches the store.

    def _watch_store(self) -> None:
        """End the process if the store, which is at rank 0 or its launcher, is gone or does not respond."""
        while not self._closed.wait(self._limits.interval):
            end = self._end_of_store()
            if end is not None and self._is_leaving.acquire(blocking=False):
                if end.kind is EndKind.HANG:
                    self._write_evidence(end)
                self._leave(end, self._rank == 1)
                return

    def _end_of_store(self) -> End | None:
        now, mark, limit = time.monotonic(), current_mark(), self._limits.seconds
        host = os.environ.get("MASTER_ADDR", "another host")
        if self._lost_at is not None and min(now - self._lost_at, self._silent_s()) > LOST_S:
            message = f"the connection to rank 0 on {host} or its launcher is lost: the process there has ended"
            return End(EndKind.FAILURE, message, 1, mark.step, (0,))
        unanswered_s = now - self._exchanged_at
        if limit is None or min(unanswered_s, self._silent_s()) < limit + 5 * self._limits.interval:
            return None
        message = (
            f"rank 0 of {self._board.world_size} on {host} hangs, or its launcher does: no response of the store there "
            f"for {unanswered_s:.0f} s; this rank waits in phase {mark.phase}"
            + (f" of step {mark.step}" if mark.step else "")
            + f" (cluster.watchdog_s = {limit:g})"
        )
        return End(EndKind.HANG, message, Interrupted.exit_code, mark.step, (0,), (self._rank,))

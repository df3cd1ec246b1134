"""The lines and bars of a run's start, with a clock of the test's own."""

import os
import re
import sys
import threading
import time

import pytest
from terminal import Terminal

from megatron_gkd.reporting import phases
from megatron_gkd.reporting.phases import phase


@pytest.fixture
def clock(monkeypatch):
    """Set `clock.now` to the time in seconds. The line that announces a phase is left out."""

    class Clock:
        now = 100.0

        @staticmethod
        def monotonic():
            return Clock.now

    class NoTimer(threading.Timer):
        def start(self):
            pass

    monkeypatch.setattr(phases, "time", Clock)
    monkeypatch.setattr(phases.threading, "Timer", NoTimer)
    return Clock


@pytest.fixture
def use_terminal(monkeypatch):
    """Call it to make stderr a terminal, and get that. (pytest sets its own stderr after the fixtures.)"""

    def use():
        terminal = Terminal()
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return use


def test_a_line_in_ten_seconds_and_one_at_the_end(capsys, clock):
    with phase("Tokenizing train.jsonl", is_main=True, unit="rows") as shown:
        for done in range(0, 50_001, 2_000):
            shown.update(done, 50_000)
            clock.now += 1
    assert capsys.readouterr().out.splitlines() == [
        "Tokenizing train.jsonl: 20000 of 50000 rows (2000 rows/s)",
        "Tokenizing train.jsonl: 40000 of 50000 rows (2000 rows/s)",
        "Tokenizing train.jsonl: 50000 rows in 26.0 s (1923 rows/s)",
    ]


def test_what_was_done_before_is_in_the_count_and_not_in_the_rate(capsys, clock):
    with phase("Tokenizing a.jsonl", is_main=True, unit="rows") as shown:
        shown.update(900, 1000)
        clock.now += 10
        shown.update(950, 1000)
    assert capsys.readouterr().out.splitlines() == [
        "Tokenizing a.jsonl: 950 of 1000 rows (5.0 rows/s)",
        "Tokenizing a.jsonl: 950 rows in 10.0 s (5.0 rows/s)",
    ]


def test_a_count_without_a_total(capsys, clock):
    with phase("Loading x", is_main=True, unit="tensors") as shown:
        shown.update(0)
        clock.now += 20
        shown.update(300)
    assert capsys.readouterr().out.splitlines()[0] == "Loading x: 300 tensors (15 tensors/s)"


def test_a_short_phase_prints_no_line(capsys, clock):
    with phase("Loading x", is_main=True, unit="tensors") as shown:
        shown.update(0, 3)
        clock.now += 0.9
        shown.update(3, 3)
    with phase("Connecting", is_main=True):
        clock.now += 0.9
    assert capsys.readouterr() == ("", "")


def test_a_phase_that_fails_is_not_done(capsys, clock):
    def fail():
        with phase("Loading x", is_main=True):
            clock.now += 5
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("unit", [None, "rows"])
def test_another_rank_shows_nothing(unit, capsys, clock, use_terminal):
    terminal = use_terminal()
    with phase("Loading x", is_main=False, unit=unit) as shown:
        for done in range(5):
            clock.now += 20
            shown.update(done, 5)
    assert capsys.readouterr().out == "" and terminal.getvalue() == ""


def test_a_long_phase_is_announced_before_its_end(capsys, monkeypatch):
    monkeypatch.setattr(phases, "ANNOUNCE_AFTER_S", 0.01)
    printed, deadline = "", time.monotonic() + 20
    with phase("Opening the student x", is_main=True):
        while not printed and time.monotonic() < deadline:
            time.sleep(0.005)
            printed = capsys.readouterr().out
    assert printed == "Opening the student x ...\n"
    assert re.fullmatch(r"Opening the student x: done in \d+\.\d s\n", capsys.readouterr().out)


def test_a_bar_on_a_terminal_gives_way_to_its_last_line(clock, use_terminal, capsys):
    terminal = use_terminal()
    with phase("Tokenizing [x]", is_main=True, unit="rows") as shown:
        shown.update(0, 1000)
        clock.now += 10
        shown.update(400, 1000)
        drawn = terminal.getvalue()
        clock.now += 5
        shown.update(1000, 1000)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn)
    assert "Tokenizing [x]" in plain and "400 of 1000 rows (40 rows/s)" in plain
    after = terminal.getvalue()[len(drawn) :]
    assert after.endswith("Tokenizing [x]: 1000 rows in 15.0 s (67 rows/s)\n") and "\x1b[?25h" in after
    assert capsys.readouterr().out == ""


def test_a_phase_that_counts_nothing_is_a_line_on_the_terminal(clock, use_terminal, capsys):
    terminal = use_terminal()
    with phase("Starting the rollout engine vllm", is_main=True):
        clock.now += 30
    assert terminal.getvalue() == "Starting the rollout engine vllm: done in 30.0 s\n" and capsys.readouterr().out == ""


@pytest.mark.skipif(not hasattr(os, "register_at_fork"), reason="needs fork")
def test_no_process_is_forked_in_the_middle_of_a_line():
    """A copy of a stream's lock, held by a thread that the child does not have, would block the child's end."""
    holds, may_end = threading.Event(), threading.Event()

    def print_slowly():
        with phases._printing:
            holds.set()
            may_end.wait(timeout=20)

    thread = threading.Thread(target=print_slowly)
    thread.start()
    assert holds.wait(timeout=20)
    threading.Timer(0.2, may_end.set).start()
    child = os.fork()
    if child == 0:
        os._exit(0 if may_end.is_set() and phases._printing.acquire(timeout=5) else 1)
    _, status = os.waitpid(child, 0)
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0

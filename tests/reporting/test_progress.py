import io
import re
import sys

import pytest
from terminal import Terminal

from megatron_gkd.reporting import Progress, describe

RECORD = {
    "step": 1,
    "loss": 1.234,
    "divergence": 0.12,
    "grad_norm": 0.9,
    "lr": 1e-4,
    "tokens_per_second": 1234.4,
    "peak_memory_bytes": 1,
}


@pytest.fixture
def clock(monkeypatch):
    """Set `clock.now` to the time in seconds."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("megatron_gkd.reporting.progress.time.monotonic", lambda: Clock.now)
    return Clock


def test_describe_shows_known_numbers():
    assert describe(RECORD) == "loss 1.2340 divergence 0.1200 grad_norm 0.9 lr 1.0e-04 1234 tok/s"
    assert describe({"split": "validation", "loss": 2.0, "divergence": None}) == "loss 2.0000"


def test_plain_lines_where_there_is_no_terminal(capsys, clock):
    with Progress(200, True, "student") as progress:
        for step in (1, 2):
            clock.now += 7 if step == 1 else 2
            progress.update(step, {"loss": 0.5})
        progress.message("validation loss 2.0")
    assert capsys.readouterr().out.splitlines() == [
        "student: 200 steps",
        "step 1/200 loss 0.5000 eta 23:13",
        "step 2/200 loss 0.5000 eta 06:36",  # 198 steps at 2 s: the slow first one is left out
        "validation loss 2.0",
    ]


def test_hours_left(capsys, clock):
    with Progress(1801, True, "x") as progress:
        clock.now += 1
        progress.update(1, {})
        clock.now += 2.5
        progress.update(2, {})
    assert capsys.readouterr().out.splitlines()[-1].endswith("eta 1:14:58")


def test_a_line_each_log_interval_and_for_the_last_step(capsys):
    with Progress(11, True, "student", log_interval=5) as progress:
        for step in range(1, 12):
            progress.update(step, RECORD)
    printed = re.findall(r"^step (\d+)/11 loss 1\.2340 .* eta \d\d:\d\d$", capsys.readouterr().out, re.MULTILINE)
    assert printed == ["5", "10", "11"]


def test_nothing_where_it_is_not_enabled(capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(2, False, "student") as progress:
        progress.update(1, RECORD)
        progress.message("hello")
    assert capsys.readouterr().out == "" and terminal.getvalue() == ""


@pytest.mark.parametrize("stream", ["stderr", "stdout"])
def test_a_bar_on_whichever_stream_is_a_terminal(monkeypatch, stream):
    terminal, other = Terminal(), io.StringIO()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal if stream == "stderr" else other)
    monkeypatch.setattr(sys, "stdout", terminal if stream == "stdout" else other)
    with Progress(2, True, "student", log_interval=100) as progress:
        progress.update(1, RECORD)
        progress.message("validation [loss] 2.0")
        progress.update(2, {**RECORD, "loss": 0.5})
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert "validation [loss] 2.0" in shown, "text in brackets is no markup"
    last = shown.replace("\r", "\n").rstrip("\n").splitlines()[-1]
    for piece in ("student", "2/2", "loss 0.5000 1234 tok/s", "eta"):
        assert piece in last
    assert other.getvalue() == ""


def test_an_error_inside_leaves_the_terminal_usable(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with pytest.raises(RuntimeError), Progress(2, True, "student"):
        raise RuntimeError
    assert terminal.getvalue().endswith("\x1b[?25h"), "the cursor is shown again"

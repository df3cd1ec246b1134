"""Records of the package's logger on the console and in the files of the ranks."""

import logging
import re
import sys
import warnings

import pytest
from terminal import Terminal

from megatron_gkd.reporting import Progress
from megatron_gkd.reporting.logging import LOGGER, log_to_console, log_to_file

PREFIX = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def test_a_record_has_time_level_and_rank(capsys):
    with log_to_console("info", "main", 0):
        LOGGER.info("exporting to %s", "runs/x")
        LOGGER.debug("not recorded")
        LOGGER.warning("a warning")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(f"{PREFIX} INFO rank 0: exporting to runs/x", lines[0])
    assert re.fullmatch(f"{PREFIX} WARNING rank 0: a warning", lines[1])


@pytest.mark.parametrize(("ranks", "shown"), [("main", ["an error"]), ("all", ["a message", "an error"])])
def test_the_console_shows_errors_of_every_rank(ranks, shown, capsys):
    with log_to_console("info", ranks, 3):
        LOGGER.info("a message")
        LOGGER.error("an error")
    assert [line.partition("rank 3: ")[2] for line in capsys.readouterr().out.splitlines()] == shown


def test_other_ranks_write_files(tmp_path, capsys):
    for rank in (0, 2):
        with log_to_console("debug", "main", rank), log_to_file(tmp_path, rank):
            LOGGER.debug("of rank %d", rank)
    (file,) = (tmp_path / "logs").iterdir()
    assert file.name == "rank_2.log" and file.read_text().endswith(" DEBUG rank 2: of rank 2\n")
    assert capsys.readouterr().out.endswith(" DEBUG rank 0: of rank 0\n")


def test_python_warnings_are_records(capsys):
    with warnings.catch_warnings(), log_to_console("info", "main", 0):
        warnings.simplefilter("always")
        logging.captureWarnings(True)  # pytest's own capture, and `catch_warnings`, replace the function
        warnings.warn("no compiled kernels", stacklevel=1)
    out = capsys.readouterr().out
    assert " WARNING rank 0: " in out and "no compiled kernels" in out and "\n\n" not in out


def test_a_file_that_can_not_be_written_is_an_error_on_the_console(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file in the place of the folder")
    with log_to_console("info", "main", 1), log_to_file(tmp_path, 1):
        LOGGER.info("goes on")
    (line,) = capsys.readouterr().out.splitlines()
    assert "ERROR rank 1: " in line and "rank_1.log: can't be written" in line


def test_afterwards_the_logger_is_as_before(tmp_path):
    before = (LOGGER.level, LOGGER.propagate, list(LOGGER.handlers))
    with log_to_console("error", "all", 1), log_to_file(tmp_path, 1):
        assert len(LOGGER.handlers) == len(before[2]) + 2
    assert (LOGGER.level, LOGGER.propagate, LOGGER.handlers) == before


def test_a_record_is_above_the_progress_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with log_to_console("info", "main", 0), Progress(2, True, "student"):
        LOGGER.info("validation [loss] 2.0")
    assert "INFO rank 0: validation [loss] 2.0" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())

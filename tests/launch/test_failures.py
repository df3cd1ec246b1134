"""What a rank does with the reason why it fails, where our launcher, torchrun or no launcher runs it."""

import multiprocessing
import os
import socket
import sys

import pytest

from megatron_gkd.launch import claims, failures
from megatron_gkd.launch.failures import read_failure, report_failure


@pytest.fixture(autouse=True)
def variables(monkeypatch, tmp_path):
    for name in ("RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK", failures.FOLDER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(claims.tempfile, "gettempdir", lambda: str(tmp_path))
    return monkeypatch


def torchrun(variables, rank, **others):
    for name, value in {"RANK": rank, "TORCHELASTIC_RUN_ID": "run", **others}.items():
        variables.setenv(name, str(value))


def test_a_failure_is_written_for_our_launcher_and_not_printed(variables, tmp_path, capsys):
    variables.setenv(failures.FOLDER, str(tmp_path))
    variables.setenv("RANK", "3")
    report_failure("KeyError: 'ä'", "Traceback ...", 1)
    found = read_failure(tmp_path, 3)
    assert (found.message, found.traceback, found.code, found.is_shared) == ("KeyError: 'ä'", "Traceback ...", 1, False)
    assert capsys.readouterr().err == "" and read_failure(tmp_path, 0) is None


def test_a_failure_is_printed_where_the_launcher_has_ended(variables, tmp_path, capsys):
    variables.setenv(failures.FOLDER, str(tmp_path / "none"))
    report_failure("a mistake", None, 2)
    assert capsys.readouterr().err == "a mistake\n"


def test_a_failure_is_printed_without_a_launcher(capsys):
    report_failure("a mistake", None, 2)
    report_failure("KeyError: 0", "Traceback\nKeyError: 0\n", 1)
    assert capsys.readouterr().err == "a mistake\nTraceback\nKeyError: 0\n"


def test_without_torchrun_rank_0_prints_a_shared_failure(variables, capsys):
    variables.setenv("RANK", "1")
    report_failure("a mistake", None, 2, is_shared=True)
    assert capsys.readouterr().err == ""
    report_failure("of this rank", None, 2)
    assert capsys.readouterr().err == "rank 1: of this rank\n"


def test_under_torchrun_the_first_rank_prints_whichever_it_is(variables, capsys):
    for rank in (1, 0):
        torchrun(variables, rank)
        report_failure("a mistake", None, 2, is_shared=True)
        report_failure("a row", None, 2)
    assert capsys.readouterr().err == "a mistake\nrank 1: a row\n"


def test_another_attempt_prints_again(variables, capsys):
    for attempt in (0, 1):
        torchrun(variables, 0, TORCHELASTIC_RESTART_COUNT=attempt)
        report_failure("a mistake", None, 2)
    assert capsys.readouterr().err == "a mistake\n" * 2


def _report_at_once(barrier, path):
    sys.stderr = open(path, "a")
    barrier.wait()
    claims.print_once("a mistake")
    os._exit(0)


def test_ranks_that_fail_at_the_same_time_print_once(variables, tmp_path):
    torchrun(variables, 0)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(6)
    ranks = [context.Process(target=_report_at_once, args=(barrier, tmp_path / "err")) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert (tmp_path / "err").read_text() == "a mistake\n"


def test_other_ranks_print_where_the_rank_with_the_claim_dies(variables, tmp_path, capsys):
    variables.setattr(claims, "PRINTED_WITHIN_S", 0.1)
    torchrun(variables, 0)
    claim = claims._file("a mistake", os.environ)
    assert claims._create(claim)
    report_failure("a mistake", None, 2)
    assert capsys.readouterr().err == "a mistake\n"


@pytest.mark.parametrize("is_listening", [True, False])
def test_a_later_node_prints_only_while_the_first_one_goes_on(variables, capsys, is_listening):
    variables.setattr(failures, "_FIRST_NODE_ENDS_WITHIN_S", 0.5)
    with socket.socket() as first_node:
        first_node.bind(("127.0.0.1", 0))
        if is_listening:
            first_node.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": first_node.getsockname()[1]}
        torchrun(variables, 2, GROUP_RANK=1, TORCHELASTIC_USE_AGENT_STORE=True, **where)
        report_failure("no such file", None, 2, is_shared=True)
        assert capsys.readouterr().err == ("no such file\n" if is_listening else "")
        report_failure("a row of this rank", None, 2)
        assert capsys.readouterr().err == "rank 2: a row of this rank\n"


def test_a_message_is_printed_where_the_folder_for_claims_cannot_be_made(variables, tmp_path, capsys):
    variables.setattr(claims.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    torchrun(variables, 0)
    report_failure("a mistake", None, 2)
    assert capsys.readouterr().err == "a mistake\n"


def test_old_claims_are_removed(variables, tmp_path, capsys):
    torchrun(variables, 0)
    report_failure("first", None, 2)
    (old,) = (tmp_path / f"megatron-gkd-{os.getuid()}").iterdir()
    os.utime(old, (0, 0))
    report_failure("second", None, 2)
    assert not old.exists()

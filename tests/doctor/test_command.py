"""The report as a whole: the command, its exit code, its JSON, and checks that fail or hang."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from doctor.facts import subject
from launching import environment, is_alive, wait_for
from recipe_workspace import Workspace

from megatron_gkd import cli
from megatron_gkd.doctor import examination
from megatron_gkd.doctor.examination import examine
from megatron_gkd.doctor.finding import Check, Finding
from megatron_gkd.doctor.processes import run_python, run_together
from megatron_gkd.doctor.recipe import find_recipe, open_subject
from megatron_gkd.doctor.report import line_of


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Workspace(tmp_path)


def command(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "megatron_gkd", "doctor", *arguments],
        cwd=folder,
        env=environment() | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_this_machine_as_json(workspace, tmp_path):
    done = command(tmp_path, "recipe.yaml", "--nproc", "2", "--json", "--max_length", "128")
    report = json.loads(done.stdout)
    assert report["format"] == 1 and report["counts"]["failed"] == 0, report
    assert sum(report["counts"].values()) == len(report["findings"]) > 20
    assert {frozenset(one) for one in report["findings"]} == {frozenset({"name", "status", "text", "remedy"})}
    names = [one["name"] for one in report["findings"]]
    assert {"torch", "compiled kernels", "output_dir", "hub", "recipe"} <= set(names)
    (tested,) = [one for one in report["findings"] if one["name"] == "gradient self-test"]
    assert tested["status"] == "ok" and "2 ranks over gloo" in tested["text"]
    assert done.returncode == 0 and done.stderr == ""


@pytest.fixture
def few_checks(monkeypatch):
    """Leave the recipe's check and one that is always right."""

    def fine(_):
        yield Finding("machine", "ok", "fine")

    checks = [Check("machine", fine), Check("recipe", find_recipe)]
    monkeypatch.setattr(examination, "checks_of", lambda subject: checks)


def test_a_wrong_recipe_is_a_failed_line_and_1(workspace, few_checks, capsys):
    assert cli.main(["doctor", "recipe.yaml", "--nproc", "2", "--beta", "2", "--lr", "x"]) == 1
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("failed")]
    assert len(lines) == 2 and "distill.beta = 2: must be a number in [0, 1]" in lines[0]
    assert out.splitlines()[0].split() == ["ok", "machine", "fine"] and out.endswith("\n1 ok, 0 warning, 2 failed\n")
    assert err == "megatron-gkd doctor: failed: recipe\n"


def test_without_a_recipe(few_checks, capsys, monkeypatch):
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\n1 ok, 0 warning, 0 failed\n")
    assert cli.main(["doctor", "--json", "--nproc", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"ok": 1, "warning": 0, "failed": 0}
    for arguments in (["--beta", "1"], ["--nproc", "0"]):
        assert cli.main(["doctor", *arguments]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_help(capsys):
    assert cli.main(["doctor", "--help"]) == 0
    out = capsys.readouterr().out
    assert "megatron-gkd doctor [recipe.yaml]" in out and "options of doctor:\n  --nproc" in out


def test_a_recipe_whose_files_are_missing_is_checked_all_the_same(workspace, tmp_path):
    (tmp_path / "train.jsonl").unlink()
    made = open_subject("recipe.yaml", [], 2)
    assert made.recipe is not None and len(made.problems) == 1
    assert open_subject("nowhere.yaml", [], 2).recipe is None
    other = open_subject("recipe.yaml", [], 3)
    assert other.recipe is not None and any("number of processes (3)" in one for one in other.problems)
    assert open_subject("recipe.yaml", ["--beta", "2"], 2).recipe is None, "its values are unknown"


def test_a_check_that_hangs_or_fails_ends_nothing():
    released = threading.Event()

    def hang(_):
        yield Finding("late", "ok", "never read")
        released.wait(60)

    def fail(_):
        yield Finding("first", "ok", "read")
        raise KeyError("x")

    def fine(_):
        yield Finding("last", "ok", "read")

    start = time.monotonic()
    checks = [Check("hang", hang, 0.2), Check("slow", hang, 0.2, late="warning"), Check("fail", fail), Check("", fine)]
    findings = list(examine(subject(), checks))
    released.set()
    assert time.monotonic() - start < 10
    assert [(one.name, one.status) for one in findings] == [
        ("hang", "failed"),
        ("slow", "warning"),
        ("first", "ok"),
        ("fail", "failed"),
        ("last", "ok"),
    ]
    assert "\n" in line_of(findings[0]) and "\n" not in line_of(findings[-1])


def test_processes_that_hang_are_killed_with_their_children(tmp_path):
    file = str(tmp_path / "pid")
    child = f"import subprocess; open({file!r}, 'w').write(str(subprocess.Popen(['sleep', '60']).pid))"
    hanging = f"{child}; import time; time.sleep(60)"
    start = time.monotonic()
    outcomes = run_together([("-c", hanging), ("-c", "import sys; sys.exit('no')")], 5.0)
    assert time.monotonic() - start < 20
    assert [(one.code, one.problem) for one in outcomes] == [(None, "it did not end in time"), (1, "no")]
    wait_for(lambda: not is_alive((tmp_path / "pid").read_text()))


INTERRUPTED = """
from megatron_gkd.doctor.examination import examine
from megatron_gkd.doctor.finding import Check
from megatron_gkd.doctor.processes import run_python
from megatron_gkd.doctor.subject import Subject

CHILD = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(60)"


def find(_):
    yield from run_python(["-c", CHILD], 60).stdout


list(examine(Subject(), [Check("hangs", find, 60)]))
"""


def test_an_interrupted_report_leaves_no_process(tmp_path):
    pid = tmp_path / "pid"
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL
    )
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    wait_for(lambda: not is_alive(pid.read_text().strip()))


def test_a_process_that_crashes_is_named_by_its_signal():
    outcome = run_python(["-c", "import os; os.abort()"], 20)
    assert outcome.code == -6 and outcome.problem == "signal 6"

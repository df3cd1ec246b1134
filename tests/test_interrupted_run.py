"""Whole runs that a signal ends, and what they leave in their folder."""

from __future__ import annotations

import json
import os
import socket

import psutil
from command_line import train

SIGNALED = """
import os
import signal

import megatron_gkd.runtime.preload
from megatron_gkd import cli
from megatron_gkd.training.trainer import Trainer

def write(self, record, completions, write=Trainer.write):
    write(self, record, completions)
    if record["step"] == 2 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGUSR1)

Trainer.write = write
cli.run()
"""
"""The command line, with a signal to one rank in step 2."""
BEFORE_STEP_1 = """
import os
import signal

from megatron_gkd import cli
from megatron_gkd.training import prepare

def open_models(*arguments, open_models=prepare.open_models):
    models = open_models(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()

prepare.open_models = open_models
cli.run()
"""


def test_a_signal_saves_the_run_and_the_same_command_continues_it(workspace):
    run = workspace / "runs/x"
    (workspace / "signaled.py").write_text(SIGNALED)
    finished = train(workspace, "--export_interval", "null", program="signaled.py")
    assert finished.returncode != 0
    exit_record = json.loads((run / "exit.json").read_text())
    step = exit_record["step"]
    assert exit_record["code"] == 75 and step in (2, 3)  # 3 where the signal is noted after the end of step 2
    assert exit_record["reason"] == (
        f"SIGUSR1: stopped after step {step} of 4; saved in runs/x/checkpoints/step-{step:06d}; the same command "
        "continues the run"
    )
    assert finished.stderr.count(exit_record["reason"]) == 1 and "training/run.py" not in finished.stderr
    assert not list(run.glob("hf*")) and not (run / "run.lock").exists()

    finished = train(workspace, "--export_interval", "null")
    assert finished.returncode == 0, finished.stderr
    assert f"resumed from runs/x/checkpoints/step-{step:06d}" in finished.stdout
    exit_record = json.loads((run / "exit.json").read_text())
    assert (exit_record["code"], exit_record["reason"], exit_record["step"]) == (0, "finished", 4)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "split" not in record] == [1, 2, 3, 4]


def test_a_signal_before_the_first_step_ends_the_run_at_once(workspace):
    (workspace / "early.py").write_text(BEFORE_STEP_1)
    finished = train(workspace, "--tensor_model_parallel_size", "1", processes=1, program="early.py")
    assert finished.returncode != 0
    assert finished.stderr.count("SIGTERM before the first step: nothing has changed") == 1
    exit_record = json.loads((workspace / "runs/x/exit.json").read_text())
    assert (exit_record["code"], exit_record["step"]) == (75, 0)
    assert not (workspace / "runs/x/run.lock").exists()


def test_a_second_run_in_the_same_folder_is_refused(workspace):
    run, me = workspace / "runs/x", psutil.Process()
    run.mkdir(parents=True)
    (run / "exit.json").write_text("of the first run")
    (run / "run.lock").write_text(
        json.dumps({"host": socket.gethostname(), "boot": boot(), "pid": me.pid, "started": me.create_time()})
    )
    finished = train(workspace, "--tensor_model_parallel_size", "1", processes=1)
    assert finished.returncode != 0
    assert f"output.output_dir = runs/x: a run is under way there (process {os.getpid()} on" in finished.stderr
    assert "training/run.py" not in finished.stderr, "a traceback of ours"
    assert sorted(path.name for path in run.iterdir()) == ["exit.json", "run.lock"]
    assert (run / "exit.json").read_text() == "of the first run"


def boot():
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()

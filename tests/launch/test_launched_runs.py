"""Whole runs that `--nproc 2` starts."""

import json
import os
import signal
import subprocess
import sys

from launching import environment, finish, wait_for

SMALL = ("--dtype", "fp32", "--export_interval", "null")


def start(folder, *arguments):
    command = [sys.executable, "-m", "megatron_gkd", "train", "recipe.yaml", "--nproc", "2", *SMALL, *arguments]
    variables = environment() | {"HF_DATASETS_CACHE": str(folder / "cache")}
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=out, stderr=err, start_new_session=True)


def test_ctrl_c_saves_a_run_and_the_same_command_continues_it(workspace):
    run, metrics = workspace / "runs/x", workspace / "runs/x/metrics.jsonl"
    launcher = start(workspace, "--train_iters", "40", "--lr_decay_style", "constant")
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, 200)
    os.killpg(launcher.pid, signal.SIGINT)
    assert finish(launcher, 200) == 75
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 75 and 2 <= record["step"] < 40
    note, reason = (workspace / "err").read_text().splitlines()[-2:]
    assert note == "SIGINT: stopping after this step; a second Ctrl-C ends at once" and reason == record["reason"]

    last = record["step"] + 1
    launcher = start(workspace, "--train_iters", str(last), "--lr_decay_style", "constant")
    assert finish(launcher, 200) == 0, (workspace / "err").read_text()
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in records if "split" not in record] == list(range(1, last + 1))


def test_a_bad_row_is_one_line_and_2(workspace):
    with open(workspace / "train.jsonl", "a") as file:
        file.write("{not json\n")
    assert finish(start(workspace), 200) == 2
    text = (workspace / "err").read_text()
    assert text.count("train.jsonl, line 41: not JSON") == 1 and "Traceback" not in text and "elastic" not in text

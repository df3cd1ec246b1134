"""Whole runs that `--nproc 2` starts."""

import json
import os
import signal

from command_line import train
from launching import Forked, environment, finish, wait_for

SMALL = ("--dtype", "fp32", "--export_interval", "null", "--global_batch_size", "4")


def start(folder, *arguments):
    variables = environment() | {"HF_DATASETS_CACHE": str(folder / "cache")}
    command = ("train", "recipe.yaml", "--nproc", "2", *SMALL, *arguments)
    return Forked(folder, "megatron_gkd", *command, name="launcher", variables=variables)


def test_ctrl_c_saves_a_run_and_the_same_command_continues_it(workspace):
    run, metrics = workspace / "runs/x", workspace / "runs/x/metrics.jsonl"
    launcher = start(workspace, "--train_iters", "40", "--lr_decay_style", "constant")
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, 200)
    os.killpg(launcher.pid, signal.SIGINT)
    assert finish(launcher, 200) == 75
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 75 and 2 <= record["step"] < 40
    note, reason = (workspace / "launcher.err").read_text().splitlines()[-2:]
    assert note == "SIGINT: stopping after this step; a second Ctrl-C ends at once" and reason == record["reason"]

    last = record["step"] + 1
    finished = train(workspace, *SMALL, "--train_iters", str(last), "--lr_decay_style", "constant")
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [record["step"] for record in records if "split" not in record] == list(range(1, last + 1))


def test_a_bad_row_is_one_line_and_2(workspace):
    with open(workspace / "train.jsonl", "a") as file:
        file.write("{not json\n")
    assert finish(start(workspace), 200) == 2
    text = (workspace / "launcher.err").read_text()
    assert text.count("train.jsonl, line 41: not JSON") == 1 and "Traceback" not in text and "elastic" not in text

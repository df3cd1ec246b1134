"""Real runs in which one rank hangs or fails: it is named, all ranks end, and the same command continues the run."""

from __future__ import annotations

import json
import os
import re
import socket
import time

import pytest
from faults.hangs import Hang
from faults.outcome import records
from forked_launch import Launch, printed, run
from launching import finish, start

HOST = re.escape(socket.gethostname())
SMALL = ("--dtype", "fp32", "--export_interval", "null", "--save_interval", "2", "--train_iters", "6", "--val_dataset",
         "[]", "--watchdog_s", "3", "--async_save", "false", "--global_batch_size", "4")  # fmt: skip
RANK = """
import os
import sys

sys.path.insert(0, {tests!r})
from faults.hangs import Hang
from megatron_gkd import cli

Hang("stop", 1)(int(os.environ["RANK"]))
sys.argv = ["megatron-gkd", "train", "recipe.yaml", *{options!r}]
cli.run()
"""


def launch(folder, *options, hang=None, processes=2, timeout=120.0, grace=0.0):
    arguments = ("train", "recipe.yaml", *SMALL, *options)
    logs = folder / f"logs-{time.time_ns()}"
    made = Launch(arguments, processes, folder, logs, prepare=hang, timeout=timeout, grace=grace)
    ended = run(made)
    assert not ended.timed_out, printed(made)
    return ended, printed(made)


def exit_record(folder):
    return json.loads((folder / "runs/x/exit.json").read_text())


def stacks_of(folder):
    return {path.name: path.read_text() for path in (folder / "runs/x/hangs").glob("step-*/rank-*.txt")}


def test_a_stopped_process_is_named_and_the_same_command_continues(workspace):
    """The store is the launcher's here; the launcher has to kill a process that receives nothing else."""
    (workspace / "rank.py").write_text(RANK.format(tests=os.path.dirname(__file__), options=SMALL))
    launcher = start(workspace, "--nproc", "2")
    assert finish(launcher, 180) == 75, (workspace / "launcher.err").read_text()
    text = (workspace / "launcher.err").read_text()
    record = exit_record(workspace)
    assert record["code"] == 75 and record["step"] == 2
    message = (
        rf"rank 1 of 2 on {HOST} \(process \d+\) hangs: phase \w+ of step [23], no progress for \d+ s; its process is "
        r"stopped or does not get to run, last sign of life at [\d:]+; the other ranks wait, for \d+ s, in phase "
        r"teacher of step 3 \(cluster\.watchdog_s = 3\); Python stacks are in runs/x/hangs/step-3; the same command "
        r"continues the run from its last checkpoint"
    )
    assert re.fullmatch(message, record["reason"]) and text.count(record["reason"]) == 1
    assert text.splitlines()[-1] == "rank 1 of 2 stopped, or lost the connection, after that"
    stacks = stacks_of(workspace)
    assert stacks.keys() == {"rank-0.txt"} and "in score" in stacks["rank-0.txt"]
    assert "thread MainThread:" in stacks["rank-0.txt"] and "distributed_c10d.py" in stacks["rank-0.txt"]
    assert (workspace / "runs/x/hangs/step-3/collectives-0").stat().st_size > 0

    ended, output = launch(workspace)
    assert ended.succeeded and "resumed from runs/x/checkpoints/step-000002" in output, output
    assert [record["step"] for record in records(workspace / "runs/x")] == [1, 2, 3, 4, 5, 6]


def test_rank_0_is_named_though_its_process_holds_the_store(workspace):
    layout = ("--tensor_model_parallel_size", "2")
    ended, output = launch(workspace, *layout, hang=Hang("stop", 0), processes=4, grace=10.0)  # each finds it alone
    assert [ended.codes[rank] for rank in (1, 2, 3)] == [75] * 3
    assert re.search(r"rank 0 of 4 on 127\.0\.0\.1 hangs, or its launcher does: no response of the store", output)
    assert exit_record(workspace)["code"] == 75
    assert stacks_of(workspace).keys() == {"rank-1.txt", "rank-2.txt", "rank-3.txt"}


def test_a_rank_that_hangs_in_a_phase_is_told_from_those_that_wait_for_it(workspace):
    layout = ("--tensor_model_parallel_size", "2")
    ended, output = launch(workspace, *layout, hang=Hang("sleep", 2), processes=4)
    assert list(ended.codes.values()) == [75] * 4, output
    reason = exit_record(workspace)["reason"]
    assert re.match(rf"rank 2 of 4 on {HOST} \(process \d+\) hangs: phase \w+ of step [23], no progress for", reason)
    assert " rank 0 " not in reason and " rank 1 " not in reason and " rank 3 " not in reason
    stacks = stacks_of(workspace)
    assert stacks.keys() == {f"rank-{rank}.txt" for rank in range(4)}
    assert "_sleep_for_good" in stacks["rank-2.txt"] and "_sleep_for_good" not in stacks["rank-0.txt"]
    assert output.count("hangs: ") == 1, "it is printed once"


@pytest.mark.parametrize("deed", ["slow", "wait"])
def test_a_slow_rank_that_makes_progress_is_no_hang(workspace, deed):
    # A busy machine may let a process wait for seconds.
    ended, output = launch(workspace, "--train_iters", "4", "--watchdog_s", "6", hang=Hang(deed, 1))
    assert ended.succeeded, output
    assert not (workspace / "runs/x/hangs").exists()


def test_without_a_limit_nothing_is_a_hang(workspace):
    ended, output = launch(workspace, "--train_iters", "3", "--watchdog_s", "null", hang=Hang("wait", 1))
    assert ended.succeeded and "hangs" not in output, output


def test_a_failure_ends_a_rank_that_can_not_notice_it(workspace):
    """With NCCL the other ranks wait in a collective for good."""
    ended, output = launch(workspace, "--watchdog_s", "null", hang=Hang("raise", 1, deaf=0), timeout=60.0)
    assert ended.codes[1] == 1 and "KeyError: 'a fault of the program'" in output
    assert ended.codes[0] != 0

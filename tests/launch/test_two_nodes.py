"""Training over two agents on loopback, ours and torchrun's, as over two nodes."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import psutil
import slow_steps
from command_line import train
from faults.outcome import differences
from launching import Forked, environment, finish, wait_for
from ports import free_port

SMALL = "--dtype fp32 --export_interval null --train_iters 10 --global_batch_size 4 --save_interval 5".split()
PLUGIN = ("--external_plugins", slow_steps.PLUGIN)
ARGUMENTS = ("train", "recipe.yaml", *SMALL, "--save_total_limit", "1", *PLUGIN)


def start(folder: Path, agents: list[list[str]], *arguments: str) -> list[Forked]:
    """Start two agents, the second one first, which has to wait for the other."""
    variables = environment() | {"HF_DATASETS_CACHE": str(folder / "cache")}
    second, first = (
        Forked(folder, *agents[node], *arguments, name=f"node{node}", variables=variables) for node in (1, 0)
    )
    return [first, second]


def launchers(folder: Path, *overrides: str) -> list[Forked]:
    nodes = ("--nproc", "1", "--nnodes", "2", "--rdzv", f"127.0.0.1:{free_port()}")
    agents = [["megatron_gkd", *ARGUMENTS, *overrides, *nodes, "--node-rank", str(node)] for node in (0, 1)]
    return start(folder, agents)


def torchruns(folder: Path, *overrides: str) -> list[Forked]:
    nodes = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "run")
    agent = ["torch.distributed.run", *nodes, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "-m", "megatron_gkd"]
    return start(folder, [agent, agent], *ARGUMENTS, *overrides)


def stderr(folder: Path) -> list[str]:
    return [(folder / f"node{node}.err").read_text() for node in (0, 1)]


def test_a_signal_to_one_of_two_agents_saves_and_torchrun_continues_as_one_launcher(workspace):
    run = workspace / "runs/x"
    slow_steps.write_plugin(workspace)
    slow_steps.slow_down(workspace, 0.3)
    first, second = launchers(workspace)
    wait_for(lambda: slow_steps.num_steps(run) >= 2 or first.poll() is not None, 200)
    second.send_signal(signal.SIGTERM)
    assert [finish(first, 100), finish(second, 100)] == [75, 75], stderr(workspace)
    record = json.loads((run / "exit.json").read_text())
    assert record["code"] == 75 and 2 <= record["step"] < 10 and record["reason"].startswith("SIGTERM: stopped after")
    assert "2 processes on 2 nodes" in (workspace / "node0.out").read_text()

    slow_steps.speed_up(workspace)
    agents = torchruns(workspace)
    assert [finish(agent, 200) for agent in agents] == [0, 0], stderr(workspace)
    assert json.loads((run / "exit.json").read_text())["code"] == 0

    whole = train(workspace, *ARGUMENTS[2:], "--output_dir", "runs/whole")
    assert whole.returncode == 0, whole.stderr
    assert differences(run, workspace / "runs/whole") == []


def test_a_rank_that_is_killed_on_one_node_ends_both_and_is_named_first(workspace):
    slow_steps.write_plugin(workspace)
    slow_steps.slow_down(workspace, 0.3)
    agents = launchers(workspace)
    wait_for(lambda: slow_steps.num_steps(workspace / "runs/x") >= 1 or agents[0].poll() is not None, 200)
    begin = time.monotonic()
    (rank,) = psutil.Process(agents[1].pid).children()
    rank.kill()
    assert [finish(agent, 60) for agent in agents] == [137, 137], stderr(workspace)
    assert time.monotonic() - begin < 45  # seconds on a quiet machine; never the time-out of collectives
    here, there = (text.strip().splitlines() for text in stderr(workspace)[::-1])
    assert here[-1] == "rank 1 of 2 was killed by SIGKILL (out of memory?)"
    reports = [line for line in there if " of 2 " in line]
    assert reports[0].endswith("): rank 1 of 2 was killed by SIGKILL (out of memory?)"), there

"""A run that is killed goes on by the same command, bit by bit, as if nothing had happened."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from test_train import train, workspace  # noqa: F401  (a fixture)

KILLED = """
import os
import signal

import megatron_gkd.runtime.preload
from megatron_gkd import cli
from megatron_gkd.training.trainer import Trainer

def write(self, record, completions, write=Trainer.write):
    write(self, record, completions)
    if record["step"] == {step} and os.environ["RANK"] == "{rank}":
        os.kill(os.getpid(), signal.SIGKILL)

Trainer.write = write
cli.run()
"""
"""The command line, killed after a step's record is written and before its checkpoint."""
TIMES = {"step_time_s", "teacher_time_s", "tokens_per_second", "peak_memory_bytes", "rollout_time_s", "sync_time_s"}
TIMES |= {"rollout_tokens_per_second"}


def outcome(folder):
    """What must not depend on interruptions: all numbers of the metrics but times, and the final weights."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [{name: value for name, value in json.loads(line).items() if name not in TIMES} for line in lines]
    return records, load_file(folder / "hf/model.safetensors")


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())


ON_POLICY = ("--lmbda", "0.5", "--lmbda_granularity", "row", "--max_completion_length", "8", "--log_completions")
OPTIONS = {
    "offline TP2": ("--eval_interval", "2"),
    "on-policy": (*ON_POLICY, "--log_completions_interval", "2", "--dtype", "fp32"),
    "adapters": (*ON_POLICY, *"--tuner_type lora --lora_rank 4 --dtype fp32".split()),
    "EMA self-teacher": (*"--kind self --teacher_model null --ema 0.9 --offload_teacher_model false".split(),),
}


KILLS = {"offline TP2": [(2, 1), (5, 0)], "on-policy": [(5, 0)], "adapters": [(5, 1)], "EMA self-teacher": [(5, 1)]}
"""By kind, the step in which a rank is killed, one run after another."""


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_killed_run_goes_on_bit_by_bit(kind, workspace):  # noqa: F811
    options = (*OPTIONS[kind], "--save_interval", "2", "--train_iters", "5", "--export_interval", "null")
    finished = train(workspace, *options, "--output_dir", "runs/whole")
    assert finished.returncode == 0, finished.stderr
    for step, rank in KILLS[kind]:
        (workspace / "killed.py").write_text(KILLED.format(step=step, rank=rank))
        assert train(workspace, *options, program=("killed.py",)).returncode != 0
        assert not (workspace / "runs/x/hf").exists()
    finished = train(workspace, *options)
    assert finished.returncode == 0, finished.stderr
    assert "resumed from runs/x/checkpoints/step-00000" in finished.stdout
    assert_same(outcome(workspace / "runs/x"), outcome(workspace / "runs/whole"))
    names = {path.name for path in (workspace / "runs/x/checkpoints").iterdir()}
    assert {"step-000004", "step-000005"} <= names and not any("unfinished" in name for name in names)


def test_another_recipe_is_refused_by_key(workspace):  # noqa: F811
    options = ("--tensor_model_parallel_size", "1", "--train_iters", "2", "--save_interval", "1")
    assert train(workspace, *options, processes=1).returncode == 0
    finished = train(workspace, *options, "--lr", "2e-3", processes=1)
    assert finished.returncode != 0
    message = "train.lr = 0.002: the checkpoint runs/x/checkpoints/step-000002 was trained with 0.001"
    assert finished.stderr.count(message) == 1 and "train.resume = never" in finished.stderr
    assert "in _train" not in finished.stderr, "a traceback of ours"

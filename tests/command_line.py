"""Run commands on a small recipe, and return how they end, what they print and what they leave behind.

Ranks are forked from a process that has the imports done. Tests of a launcher or of a fresh process take `torchrun` and
`run_process`, which need some ten seconds more.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import forked_launch
from checkpoints import tiny_checkpoint
from forked_launch import Launch
from world import REPOSITORY

RECIPE = """
student:  {{model: {student}}}
teacher:  {{teacher_model: {teacher}, offload_teacher_model: true}}
distill:  {{beta: 0.5, lmbda: 0.0, temperature: 0.9, sft_alpha: 0.0}}
parallel: {{tensor_model_parallel_size: 2, pipeline_model_parallel_size: 1, context_parallel_size: 1,
           expert_model_parallel_size: 1, sequence_parallel: true}}
data:     {{dataset: [train.jsonl], val_dataset: [val.jsonl], max_length: 256, packing: false}}
train:    {{micro_batch_size: 1, global_batch_size: 8, train_iters: 4, lr: 1.0e-3, seed: 1234}}
output:   {{output_dir: runs/x, export_interval: 2, log_interval: 1}}
"""
SECONDS_FROM_FAILURE_TO_SIGTERM = 1.0
"""Ranks that fail together have time to report it."""
_OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what all ranks printed."""

    returncode: int
    stdout: str
    stderr: str


def write_workspace(folder: Path) -> None:
    """Write recipe.yaml, train.jsonl and val.jsonl."""
    draw = random.Random(0)

    def words() -> str:
        return " ".join(f"w{draw.randrange(60)}" for _ in range(draw.randrange(3, 12)))

    for name, count in {"train": 40, "val": 11}.items():
        turns = [
            [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}] for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=6, hidden_size=48)
    recipe = RECIPE.format(student=tiny_checkpoint("qwen3_tied", seed=2), teacher=teacher)
    (folder / "recipe.yaml").write_text(recipe)


def train(
    folder: Path, *overrides: str, processes: int = 2, program: str | None = None, command: str = "train"
) -> Finished:
    """Run a command on `recipe.yaml` in `processes` ranks.

    Args:
        folder: the working folder.
        overrides: of the recipe.
        program: a script in `folder` in place of the package.
    """
    return _fork(folder, (command, "recipe.yaml", *overrides), processes, program)


def run(folder: Path, *arguments: str) -> Finished:
    """Run `megatron-gkd ARGUMENTS` in one process that no launcher starts."""
    return _fork(folder, arguments, None, None)


def _fork(folder: Path, arguments: tuple[str, ...], processes: int | None, program: str | None) -> Finished:
    with tempfile.TemporaryDirectory() as temporary:
        launch = Launch(
            arguments, processes, folder, Path(temporary) / "logs", program, grace=SECONDS_FROM_FAILURE_TO_SIGTERM
        )
        ended = forked_launch.run(launch)
        assert not ended.timed_out, forked_launch.printed(launch)
        code = next((code for code in ended.codes.values() if code), ended.code)
        return Finished(code, *(forked_launch.read_output(launch, stream) for stream in ("out", "err")))


def torchrun(
    folder: Path, *overrides: str, processes: int = 2, program: tuple[str, ...] = ("-m", "megatron_gkd")
) -> subprocess.CompletedProcess[str]:
    """Train by `recipe.yaml` under torchrun."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    return run_process(folder, *launcher, *program, "train", "recipe.yaml", *overrides)


def run_process(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` as no launcher starts it."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)

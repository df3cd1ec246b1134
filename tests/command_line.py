"""Run commands on a small recipe, and return how they end, what they print and what they leave behind.

Ranks are forked from a process that has the imports done.
"""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import forked_launch
from checkpoints import tiny_checkpoint
from forked_launch import Launch

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
    teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)
    recipe = RECIPE.format(student=tiny_checkpoint("qwen3_tied", seed=2), teacher=teacher)
    (folder / "recipe.yaml").write_text(recipe)


def train(
    folder: Path,
    *overrides: str,
    processes: int = 2,
    program: str | None = None,
    command: str = "train",
    draws_curves: bool = False,
) -> Finished:
    """Run a command on `recipe.yaml` in `processes` ranks.

    Args:
        folder: the working folder.
        overrides: of the recipe.
        program: a script in `folder` in place of the package.
        draws_curves: as of `Launch`.
    """
    return _fork(folder, (command, "recipe.yaml", *overrides), processes, program, draws_curves)


def run(folder: Path, *arguments: str, program: str | None = None) -> Finished:
    """Run `megatron-gkd ARGUMENTS` in one process that no launcher starts; `program` as of `train`."""
    return _fork(folder, arguments, None, program)


def _fork(
    folder: Path, arguments: tuple[str, ...], processes: int | None, program: str | None, draws_curves: bool = False
) -> Finished:
    with tempfile.TemporaryDirectory() as temporary:
        launch = Launch(
            arguments,
            processes,
            folder,
            Path(temporary) / "logs",
            program,
            grace=SECONDS_FROM_FAILURE_TO_SIGTERM,
            draws_curves=draws_curves,
        )
        ended = forked_launch.run(launch)
        assert not ended.timed_out, forked_launch.printed(launch)
        code = next((code for code in ended.codes.values() if code), ended.code)
        return Finished(code, *(forked_launch.read_output(launch, stream) for stream in ("out", "err")))

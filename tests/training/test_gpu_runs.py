"""A short run of every kind of training on one GPU, from the command line: scripts/gpu_check.sh."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from command_line import write_workspace

ROOT = Path(__file__).resolve().parents[2]
ON_POLICY = ["--lmbda", "1.0", "--engine", "megatron", "--max_completion_length", "8"]
KINDS = {
    "offline": [],
    "on-policy": ON_POLICY,
    "top-k": ["--gkd_logits_topk", "8", "--gkd_topk_tail", "bucket"],
    "LoRA": ["--lora_rank", "4", "--target_modules", "[all-linear]"],
    "MoE": ["--model", "{moe}"],
}
ONE_PROCESS = ["--tensor_model_parallel_size", "1", "--sequence_parallel", "false", "--train_iters", "2"]


def train(folder, kind):
    """Run a recipe of this kind in one process, and return the losses of its steps."""
    write_workspace(folder)
    moe = str(tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)) if kind == "MoE" else ""
    overrides = [option.format(moe=moe) for option in KINDS[kind]]
    command = [sys.executable, "-m", "megatron_gkd", "train", "recipe.yaml", *ONE_PROCESS, *overrides]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    finished = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    lines = (folder / "runs/x/metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_short_run(kind, tmp_path):
    losses = train(tmp_path, kind)
    assert len(losses) >= 2 and all(math.isfinite(loss) and loss > 0 for loss in losses)

"""On-policy training on rows with images, whole: engines compute what the trainer does, and write rows to train on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from command_line import train
from rollout.vision_contract import VISION_CHECKPOINT
from vision_checkpoints import IMAGE_ID, VIDEO_ID, image_row

RECIPE = """
student:  {{model: {student}}}
teacher:  {{teacher_model: {teacher}}}
distill:  {{beta: 1.0, lmbda: 1.0}}
parallel: {{tensor_model_parallel_size: {tensor}, sequence_parallel: {sequence_parallel}}}
data:     {{dataset: [train.jsonl], max_length: 128, max_pixels: 400}}
train:    {{micro_batch_size: 1, global_batch_size: 4, train_iters: 3, lr: 1.0e-2, dtype: fp32, freeze_vit: false,
           freeze_aligner: false, lr_decay_style: constant}}
rollout:  {{max_completion_length: 10}}
output:   {{output_dir: runs/x, export_interval: null, save_interval: null, log_interval: 1, log_completions: true,
           log_completions_interval: 1}}
"""
RESERVED = {IMAGE_ID, VIDEO_ID}


def write_workspace(folder: Path, tensor: int) -> None:
    """Write recipe.yaml and train.jsonl: rows with two images (one of them scaled), one and none."""
    sizes = [[(16, 24), (32, 16)], [(16, 16)], []]
    rows = [image_row(folder / "images", *sizes[index % 3], seed=index) for index in range(12)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = RECIPE.format(
        student=VISION_CHECKPOINT(),
        teacher=VISION_CHECKPOINT(8),
        tensor=tensor,
        sequence_parallel=str(tensor > 1).lower(),
    )
    (folder / "recipe.yaml").write_text(recipe)


def run(folder: Path, tensor: int, *options: str, command: str = "train") -> list[dict]:
    """Run a command under TP, and return the metrics of its steps."""
    finished = train(folder, *options, processes=tensor, command=command)
    assert finished.returncode == 0, finished.stderr[-3000:]
    if command != "train":
        return []
    lines = (folder / "runs/x/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "split" not in record]


def completions_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "runs/x/completions.jsonl").read_text().splitlines()]


def assert_on_policy(folder: Path, tensor: int, *options: str) -> None:
    """Assert that an engine samples with the trainer's probabilities, also after updates of the vision tower."""
    write_workspace(folder, tensor)
    steps = run(folder, tensor, *options)
    mismatches = [step["mismatch_kl"] for step in steps]
    print(f"mismatch_kl {options}: {mismatches}")
    assert len(steps) == 3 and max(map(abs, mismatches)) < 1e-5
    drawn = {token for one in completions_of(folder) for token in one["token_ids"]}
    assert len(drawn) > 20 and not drawn & RESERVED


def test_the_embedded_engine(tmp_path):
    assert_on_policy(tmp_path, 2)


def test_rows_that_are_generated_have_their_images_and_can_be_trained_on(tmp_path):
    """Half of the steps' rows are the student's own completions."""
    write_workspace(tmp_path, 1)
    run(tmp_path, 1, "--from", "student", "--output", "generated.jsonl", command="generate")
    rows = [json.loads(line) for line in (tmp_path / "generated.jsonl").read_text().splitlines()]
    assert [len(row.get("images", [])) for row in rows] == [2, 1, 0] * 4
    steps = run(tmp_path, 1, "--dataset", "generated.jsonl", "--lmbda", "0.5", "--lmbda_granularity", "row")
    assert all(step["loss"] > 0 for step in steps)


NO_VLLM = "no vLLM in this environment: bash scripts/test.sh runs this in .venv-vllm"


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM)
def test_vllm_in_the_ranks(tmp_path):
    assert_on_policy(tmp_path, 1, "--engine", "vllm", "--vllm_kv_cache_gib", "0.03")


@pytest.mark.vllm
def test_vllm_on_a_server(vision_server, tmp_path):
    assert_on_policy(tmp_path, 1, "--engine", "vllm_server", "--vllm_server_urls", vision_server.url)

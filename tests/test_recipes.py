"""The recipes that come with the project are valid as they stand, and train when they are given small models."""

import json

import pytest
from checkpoints import tiny_checkpoint
from test_train import train
from world import REPOSITORY

from megatron_gkd.config import load

RECIPES = sorted((REPOSITORY / "scripts" / "recipes").glob("*.yaml"))
SMALL = ["--max_length", "256", "--max_completion_length", "12", "--global_batch_size", "4", "--dtype", "fp32"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_valid_on_8_processes(path):
    assert load(path, world_size=8, require_paths=False).output.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_trains_the_embedded_models(path, tmp_path):
    recipe = load(path, world_size=8, require_paths=False)
    (tmp_path / "recipe.yaml").write_text(path.read_text())
    row = {"problem": "w1 w2", "solution": "w3 w4"}
    if recipe.data.preprocessor is None:
        row = {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 12)
    student = str(tiny_checkpoint("qwen3_tied", seed=2))
    teacher = student if recipe.teacher.source == "self" else str(tiny_checkpoint("qwen3", seed=1))
    models = ["--model", student] + (["--teacher_model", teacher] if recipe.teacher.teacher_model else [])
    plugins = [str(REPOSITORY / plugin) for plugin in recipe.data.external_plugins]
    iterations = [
        "--train_iters",
        "3",
        "--num_train_epochs",
        "null",
        "--lr_warmup_iters",
        "0",
        "--save_interval",
        "null",
    ]
    data = ["--dataset", "rows.jsonl", "--external_plugins", json.dumps(plugins), "--teacher_max_length", "null"]
    finished = train(tmp_path, *models, *data, *SMALL, *iterations)
    assert finished.returncode == 0, finished.stderr
    records = (tmp_path / "runs" / path.stem / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2, 3]

"""The recipes that come with the project are valid as they stand, and train when they are given small models."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from teachers.fake_server import FakeServer
from test_train import train
from world import REPOSITORY

from megatron_gkd.config import load

RECIPES = sorted((REPOSITORY / "scripts" / "recipes").glob("*.yaml"))
SMALL = ["--max_length", "256", "--max_completion_length", "12", "--global_batch_size", "4", "--dtype", "fp32"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_valid_on_8_processes(path):
    assert load(path, world_size=8, require_paths=False).output.output_dir == f"runs/{path.stem}"


@contextmanager
def embedded_teacher(path: Path) -> Iterator[list[str]]:
    """The arguments that put a small model in the place of the recipe's teacher."""
    checkpoint = tiny_checkpoint("qwen3", seed=1)
    if load(path, world_size=8, require_paths=False).teacher.source == "server":
        with FakeServer(checkpoint) as server:
            yield ["--teacher_model_server", server.url]
    else:
        yield ["--teacher_model", str(checkpoint)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_trains_the_embedded_models(path, tmp_path):
    (tmp_path / "recipe.yaml").write_text(path.read_text())
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)
    models = ["--model", str(tiny_checkpoint("qwen3_tied", seed=2))]
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
    with embedded_teacher(path) as teacher:
        finished = train(tmp_path, *models, *teacher, "--dataset", "rows.jsonl", *SMALL, *iterations)
    assert finished.returncode == 0, finished.stderr
    records = (tmp_path / "runs" / path.stem / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [1, 2, 3]

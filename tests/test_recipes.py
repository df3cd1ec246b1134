"""The recipes that come with the project are valid as they stand, and train when they are given small models."""

import importlib.util
import json

import pytest
import yaml
from checkpoints import tiny_checkpoint
from test_train import train
from world import REPOSITORY

from megatron_gkd.config import load

RECIPES = sorted((REPOSITORY / "scripts" / "recipes").glob("*.yaml"))
SMALL = ["--max_length", "256", "--max_completion_length", "12", "--global_batch_size", "4", "--dtype", "fp32"]
THREE_STEPS = "--train_iters 3 --num_train_epochs null --lr_warmup_iters 0 --save_interval null".split()
NO_VLLM = "no vLLM in this environment: bash scripts/test.sh runs this in .venv-vllm"


def engine_of(path):
    return yaml.safe_load(path.read_text())["rollout"]["engine"]


def case(path):
    marks = [] if engine_of(path) == "megatron" else [pytest.mark.vllm]
    if engine_of(path) == "vllm":
        marks.append(pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM))
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_valid_on_8_processes(path):
    assert load(path, world_size=8, require_paths=False).output.output_dir == f"runs/{path.stem}"


def test_there_is_one_for_every_engine():
    names = {"on_policy", "mixed"}
    for engine, suffix in {"megatron": "", "vllm": "_vllm", "vllm_server": "_vllm_server"}.items():
        assert {path.stem for path in RECIPES if engine_of(path) == engine} == {name + suffix for name in names}


@pytest.mark.parametrize("path", [case(path) for path in RECIPES])
def test_trains_the_embedded_models(path, tmp_path, request):
    (tmp_path / "recipe.yaml").write_text(path.read_text())
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    (tmp_path / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 12)
    student, teacher = tiny_checkpoint("qwen3_tied", seed=2), tiny_checkpoint("qwen3", seed=1)
    engine = []
    if engine_of(path) == "vllm":
        student = tiny_checkpoint("qwen3_tied", seed=2, head_dim=32)
        engine = ["--vllm_kv_cache_gib", "0.03"]
    elif engine_of(path) == "vllm_server":
        student = tiny_checkpoint("qwen3", seed=2, head_dim=32)
        engine = ["--vllm_server_urls", request.getfixturevalue("student_server").url]
    models = ["--model", str(student), "--teacher_model", str(teacher)]
    finished = train(tmp_path, *models, "--dataset", "rows.jsonl", *SMALL, *THREE_STEPS, *engine)
    assert finished.returncode == 0, finished.stderr
    records = (tmp_path / "runs" / path.stem / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(record) for record in records]
    assert [step["step"] for step in steps] == [1, 2, 3]
    sampled = [step for step in steps if step["source"] == "student"]
    assert sampled, "a step samples"
    for step in sampled:
        assert step["rollout_tokens_per_second"] > 0
        if step["num_tokens"]:  # the engine's weights are those of this very step
            assert abs(step["mismatch_kl"]) < 1e-4

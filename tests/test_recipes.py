"""The recipes that come with the project are valid as they stand, and train when they are given small models."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from checkpoints import tiny_checkpoint
from command_line import run, train
from PIL import Image
from teachers.fake_server import FakeServer
from vision_checkpoints import tiny_vision_checkpoint
from world import REPOSITORY

from megatron_gkd.config.load import load

RECIPES = sorted((REPOSITORY / "scripts" / "recipes").glob("*.yaml"))
SMALL = ["--max_length", "256", "--max_completion_length", "12", "--global_batch_size", "4", "--dtype", "fp32"]
SMALL += ["--vllm_max_model_len", "null"]
THREE_STEPS = "--train_iters 3 --num_train_epochs null --lr_warmup_iters 0 --save_interval null".split()
SWIFT_EXAMPLE = {
    "model": "Qwen/Qwen3-8B-Base",
    "gkd_logits_topk": 20,
    "tuner_type": "lora",
    "lmbda": 1,
    "beta": 1,
    "micro_batch_size": 2,
    "global_batch_size": 16,
    "lr": 5e-5,
    "max_completion_length": 8192,
    "vllm_gpu_memory_utilization": 0.5,
    "vllm_max_model_len": 16384,
    "sleep_level": 1,
    "recompute_granularity": "selective",
    "temperature": 1.0,
    "sequence_parallel": True,
}
READ_IMAGES = {"qwen2_5_vl", "qwen3_vl", "internvl"}  # the recipes of these names, and small models
NO_VLLM = "no vLLM in this environment: bash scripts/test.sh runs this in .venv-vllm"


def loaded(path):
    return load(path, world_size=8, require_paths=False)


def engine_of(path):
    """Return the rollout engine; None where nothing is sampled."""
    recipe = loaded(path)
    return recipe.rollout.engine if recipe.distill.lmbda > 0 else None


def case(path):
    marks = [pytest.mark.vllm] if engine_of(path) in ("vllm", "vllm_server") else []
    if engine_of(path) == "vllm":
        marks.append(pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM))
    return pytest.param(path, marks=marks, id=path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_valid_on_8_processes(path):
    assert loaded(path).output.output_dir == f"runs/{path.stem}"


def test_there_is_one_for_every_engine():
    for engine, suffix in {"megatron": "", "vllm": "_vllm", "vllm_server": "_vllm_server"}.items():
        assert {"on_policy" + suffix, "mixed" + suffix} <= {path.stem for path in RECIPES if engine_of(path) == engine}


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason=NO_VLLM)
def test_the_example_of_ms_swift_passes_check(tmp_path):
    """The recipe has the example's values of the keys that both have."""
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "w1"}]}\n')
    path = REPOSITORY / "scripts/recipes/lora_on_policy_vllm.yaml"
    checked = run(tmp_path, "check", str(path), "--nproc", "8")
    assert checked.returncode == 0, checked.stderr
    recipe, example = loaded(path), SWIFT_EXAMPLE
    found = {leaf: value for section in recipe for leaf, value in dict(section[1] or {}).items()}
    assert {key: found[key] for key in example} == example
    assert recipe.teacher.source == "server" and recipe.lora.lora_rank == 8


@contextmanager
def small_teacher(path: Path) -> Iterator[list[str]]:
    """Return the arguments that put small models in the place of the recipe's teachers."""
    section, checkpoint = loaded(path).teacher, tiny_checkpoint("qwen3", seed=1)
    if path.stem in READ_IMAGES:
        checkpoint = tiny_vision_checkpoint(path.stem, seed=1)
    if section.teachers:
        yield [
            "--teachers",
            yaml.safe_dump([{"tags": one.tags[0], "teacher_model": str(checkpoint)} for one in section.teachers]),
        ]
    elif section.source == "server":
        with FakeServer(checkpoint) as server:
            yield ["--teacher_model_server", server.url]
    elif section.source == "local":
        yield ["--teacher_model", str(checkpoint)]
    elif section.teacher_model is not None:
        yield ["--teacher_model", str(tiny_checkpoint("qwen3_tied", seed=2))]  # `small_student`
    else:
        yield []


def small_student(path: Path, request) -> list[str]:
    """Return the arguments that name a student which the recipe's rollout engine can serve, and the engine's own."""
    if path.stem in READ_IMAGES:
        return ["--model", str(tiny_vision_checkpoint(path.stem, seed=2))]
    match engine_of(path):
        case "vllm":
            return ["--model", str(tiny_checkpoint("qwen3_tied", seed=2, head_dim=32)), "--vllm_kv_cache_gib", "0.03"]
        case "vllm_server":
            url = request.getfixturevalue("student_server").url
            return ["--model", str(tiny_checkpoint("qwen3", seed=2, head_dim=32)), "--vllm_server_urls", url]
    if loaded(path).parallel.expert_model_parallel_size > 1:
        return ["--model", str(tiny_checkpoint("qwen3_moe", seed=2)), "--expert_model_parallel_size", "2"]
    return ["--model", str(tiny_checkpoint("qwen3_tied", seed=2))]


def prepared(path: Path, folder: Path, *arguments: str) -> list[str]:
    """Run the commands that the recipe's header has before `train`; return the arguments that name their output."""
    if path.stem == "cached":
        teacher = ["--teacher_model", str(tiny_checkpoint("qwen3", seed=1)), "--tensor_model_parallel_size", "2"]
        command, made = ["score", *teacher, "--output", "made"], ["--teacher_cache", "made"]
    elif path.stem == "presampled":
        command = [
            "generate",
            "--from",
            "teacher",
            "-n",
            "2",
            "--truncated_completions",
            "keep",
            "--output",
            "made.jsonl",
        ]
        made = ["--dataset", "made.jsonl"]
    else:
        return []
    finished = train(folder, *arguments, *command[1:], command=command[0])
    assert finished.returncode == 0, finished.stderr
    return made


def rows_with_images(folder: Path) -> list[dict]:
    """Return rows with images in both of the ways that a recipe's header names, and one of text alone."""
    Image.new("RGB", (16, 24), (200, 30, 90)).save(folder / "page.png")
    answer = {"role": "assistant", "content": "w3 w4"}
    image, text = {"type": "image", "image": "page.png"}, {"type": "text", "text": "w1"}
    return [
        {"messages": [{"role": "user", "content": [image, text]}, answer]},
        {"messages": [{"role": "user", "content": "<image> w2"}, answer], "images": ["page.png"]},
        {"messages": [{"role": "user", "content": "w1 w2"}, answer]},
    ] * 4


@pytest.mark.parametrize("path", [case(path) for path in RECIPES])
def test_trains_the_embedded_models(path, tmp_path, request):
    (tmp_path / "recipe.yaml").write_text(path.read_text())
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4"}]
    rows = [{"messages": turns, "subject": subject} for subject in ("math", "code")] * 6
    if path.stem in READ_IMAGES:
        rows = rows_with_images(tmp_path)
    if loaded(path).data.preprocessor is not None:
        rows = [{"problem": "w1 w2", "solution": "w3 w4"}] * 12
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with small_teacher(path) as teacher:
        models = [*small_student(path, request), *teacher]
        plugins = [str(REPOSITORY / plugin) for plugin in loaded(path).data.external_plugins]
        data = ["--dataset", "rows.jsonl", "--external_plugins", json.dumps(plugins), "--teacher_max_length", "null"]
        data += prepared(path, tmp_path, *models, *data, *SMALL)
        finished = train(tmp_path, *models, *data, *SMALL, *THREE_STEPS)
    assert finished.returncode == 0, finished.stderr
    records = (tmp_path / "runs" / path.stem / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(record) for record in records]
    assert [step["step"] for step in steps] == [1, 2, 3]
    sampled = [step for step in steps if step["source"] == "student"]
    assert bool(sampled) == (engine_of(path) is not None)
    for step in sampled:
        assert step["rollout_tokens_per_second"] > 0
        if step["num_tokens"]:  # the engine's weights are those of this very step
            assert abs(step["mismatch_kl"]) < 1e-4

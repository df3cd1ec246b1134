"""The report of a run on its teachers, checkpoints and origin, from the recipe and the opened models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist
from checkpoints import tiny_checkpoint
from training_layouts import recipe_of

FUSIONS = ("gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion", "moe_permute_fusion")


def report_of(changes, teachers=None, point=None, torch_attention=True, adapters=None):
    """The report's lines, by name."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.reporting.start_report import RowsLine
    from megatron_gkd.training.start import Schedule, describe_start

    opened = {place: Checkpoint.open(str(path)) for place, path in (teachers or {}).items()}
    models = SimpleNamespace(student=Checkpoint.open(str(tiny_checkpoint("qwen3_tied"))), teachers=opened)
    rows = [RowsLine("training", "2 of 2 rows used", 7)]
    fused = dict.fromkeys(FUSIONS, False) | {"bias_activation_fusion": True}
    student = SimpleNamespace(has_torch_attention=torch_attention, adapters=adapters, config=SimpleNamespace(**fused))
    return dict(
        describe_start(recipe_of(changes), models, student, rows, Schedule(3, 0.5, point), "torch", "</s> (2)").lines()
    )


@pytest.fixture(autouse=True)
def world(monkeypatch):
    """One process that no launcher has started."""
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        ({"teacher_kind": "none"}, "none: cross-entropy on the rows"),
        ({}, "teacher: llama, 37.3 K parameters, in device memory"),
        ({"offload_teacher_model": True}, "teacher: llama, 37.3 K parameters, in host memory between scorings"),
        (
            {"teacher_cache": "c"},
            "teacher: llama, 37.3 K parameters, in device memory, for rows that are not in the cache c",
        ),
        ({"teacher_kind": "self"}, "self: the student's own weights, with each row's teacher_prompt"),
        ({"teacher_kind": "self", "teacher_model": "student"}, "self: the student's weights at its start"),
        ({"teacher_kind": "self", "teacher_ema": 0.99}, "self: moving average of the student's weights, decay 0.99"),
        ({"teacher_model_server": ["http://a:1"]}, "http://a:1: a vLLM server"),
        ({"teacher_model_server": ["http://a:1", "http://b:1"]}, "http://a:1, http://b:1: vLLM servers"),
    ],
)
def test_a_teacher_and_its_location(teacher, text):
    is_local = not {"teacher_kind", "teacher_model_server"} & teacher.keys()
    section = {"teacher_model": "teacher" if is_local else None} | teacher
    teachers = {"teacher": tiny_checkpoint("llama")} if is_local else {}
    assert report_of({"teacher": section}, teachers)["teacher"] == text


def test_a_cache_names_the_model_that_was_scored_with(tmp_path):
    from megatron_gkd.checkpoint_format.cache_manifest import FILE, Manifest

    (tmp_path / FILE).write_text(Manifest(4, 1.0, "hash", "Qwen/Qwen3-8B", 99).text())
    section = {"teacher_model": None, "teacher_cache": str(tmp_path)}
    assert report_of({"teacher": section})["teacher"] == f"Qwen/Qwen3-8B: from the cache {tmp_path}"


def test_each_of_several_teachers_with_its_tags():
    one, other = {"tags": ["a"], "teacher_model": "first"}, {"tags": ["b", "c"], "teacher_model_server": ["http://a:1"]}
    section = {"teacher_model": None, "teachers": [one, other], "teacher_tag_key": "subject"}
    report = report_of({"teacher": section}, {"teacher.teachers[0]": tiny_checkpoint("llama")})
    assert report["teachers[0]"] == "first: llama, 37.3 K parameters, in device memory, of rows with the tags a"
    assert report["teachers[1]"] == "http://a:1: a vLLM server, of rows with the tags b, c"


def test_experts_are_laid_out_where_a_model_has_some():
    assert "experts" not in report_of({}, {"teacher": tiny_checkpoint("llama")})
    report = report_of({}, {"teacher": tiny_checkpoint("qwen3_moe")})
    assert report["experts"] == "1 processes = tensor 1 x expert 1 x pipeline 1 x data 1"


@pytest.mark.parametrize(
    ("train", "step", "text"),
    [
        ({}, None, "3 (0.5 epochs), starting at step 1"),
        ({"init_from": "old"}, None, "3 (0.5 epochs), starting at step 1, with the weights of old"),
        ({"init_from": "old"}, 2, "3 (0.5 epochs), starting at step 3, resumed from saved"),
    ],
)
def test_the_origin_of_a_run(train, step, text):
    point = None if step is None else SimpleNamespace(step=step, path="saved")
    assert report_of({"train": train}, point=point)["steps"] == text


def test_the_remaining_lines():
    changes = {
        "distill": {"lmbda": 0.5, "lmbda_granularity": "row"},
        "train": {"dtype": "bf16", "attention_backend": "flash"},
        "output": {"output_dir": "runs/x", "save_interval": 7, "save_total_limit": None},
    }
    report = report_of(changes, torch_attention=False)
    assert report["rollouts"] == "engine megatron, lmbda 0.5 of each row"
    assert report["completions"] == "up to 32 tokens after prompts of up to 32, ended by </s> (2)"
    assert report["precision"] == "bf16 weights and activations, fp32 gradients and optimizer"
    assert report["attention"] == "flash (Transformer Engine)"
    assert report["fusions"] == "SwiGLU; optimizer: torch"
    assert report["checkpoints"] == "every 7 steps in runs/x/checkpoints, all kept"
    assert report["rows"] == "training: 7 tokens; 2 of 2 rows used"
    assert report["device"].endswith(", 1 process on 1 node") and report["output"] == "runs/x"
    changes = {"distill": {"lmbda": 0.5}, "rollout": {"steps_per_generation": 2, "num_generations": 8}}
    assert report_of(changes)["rollouts"] == (
        "engine megatron, lmbda 0.5 of each generation; a generation: 8 completions for 2 steps, 8 of each prompt"
    )
    assert report_of({"output": {"save_interval": None}})["checkpoints"].startswith("none ")


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({"GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"}, ", 16 processes on 2 nodes"),
        ({"LOCAL_WORLD_SIZE": "4"}, ", 16 processes on 4 nodes"),
        ({}, ", 16 processes"),
    ],
)
def test_nodes_are_counted_from_the_environment(environment, text, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda: 16)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert report_of({"train": {"global_batch_size": 16}})["device"].endswith(text)


def test_adapters_are_what_is_trained():
    """q, k and v share the factor A."""
    from megatron_gkd.checkpoint_format.lora_layers import LayerRules, layers_of_shape

    layers = LayerRules(rank=4, target_modules=("q_proj", "k_proj", "v_proj", "down_proj")).choose(
        layers_of_shape(4, 0)
    )
    changes = {"lora": {"adapters": "elsewhere"}, "teacher": {"teacher_model": "student"}}
    report = report_of(changes, {"teacher": tiny_checkpoint("qwen3_tied")}, adapters=SimpleNamespace(layers=layers))
    count = 4 * 4 * ((32 + 64 + 32 + 32) + (48 + 32))
    assert report["student"].endswith(f", {count / 1000:.2f} K trainable")
    assert report["teacher"].endswith("parameters, the student with its adapters off")
    assert report["steps"].endswith("with the adapters of elsewhere")


def test_a_teacher_has_adapters_of_its_own():
    teachers = {"teacher": tiny_checkpoint("llama")}
    report = report_of({"teacher": {"teacher_model": "teacher", "teacher_adapters": "a"}}, teachers)
    assert report["teacher"] == "teacher with a: llama, 37.3 K parameters, in device memory"


def test_the_types_of_the_optimizers_state():
    memory = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "fp8", "main_grads_dtype": "bf16"}
    report = report_of({"train": {"dtype": "bf16"}, "memory": memory})
    assert report["precision"] == (
        "bf16 weights and activations, bf16 gradients, optimizer with fp32 weights, fp8 and fp32 moments"
    )

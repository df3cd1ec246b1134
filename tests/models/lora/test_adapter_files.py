"""PEFT adapters of other trainers are read if they fit, and refused in one line otherwise."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_gkd.checkpoint_format.adapter_files import AdapterFiles, AdapterProblem, adapter_config
from megatron_gkd.checkpoint_format.lora_layers import LayerRules, layers_of_shape

RANK, ALPHA, HIDDEN = 4, 8, 32
SHAPES = {
    "self_attn.q_proj": (64, HIDDEN),
    "self_attn.k_proj": (32, HIDDEN),
    "self_attn.v_proj": (32, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 64),
    "mlp.gate_proj": (48, HIDDEN),
    "mlp.up_proj": (48, HIDDEN),
    "mlp.down_proj": (HIDDEN, 48),
}
BASE = {f"model.layers.{n}.{name}.weight": shape for n in range(2) for name, shape in SHAPES.items()}
LAYERS = layers_of_shape(2, 0)
RULES = LayerRules(rank=RANK, alpha=ALPHA)
PREFIX = "base_model.model.model.layers"


@pytest.fixture
def folder(tmp_path):
    """A folder of adapters that fit."""
    tensors = {}
    for name, (rows, columns) in BASE.items():
        name = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{name}.lora_A.weight"] = np.ones((RANK, columns), np.float32)
        tensors[f"{name}.lora_B.weight"] = np.ones((rows, RANK), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = adapter_config(RULES.choose(LAYERS), LAYERS, "student", RANK)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def problem_with(folder, rules=RULES) -> str | None:
    try:
        AdapterFiles.open(folder).require_fit(rules.choose(LAYERS), BASE)
    except AdapterProblem as problem:
        return str(problem)
    return None


def test_adapters_that_fit(folder):
    assert problem_with(folder) is None
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(name.rpartition(".")[2] for name in SHAPES)
    config |= {"use_rslora": True, "lora_alpha": 4}  # 4 / sqrt(4) is 8 / 4
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert problem_with(folder) is None


JOINED = "q_proj, k_proj and v_proj are one matrix in Megatron-Core (linear_qkv) and share one A"


def without(*parts):
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def with_shape(part, shape):
    return lambda tensors: {name: np.ones(shape, np.float32) if part in name else t for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (without("k_proj"), f"has no factors of model.layers.0.self_attn.k_proj; {JOINED}, so all must have them"),
        (without("k_proj", "q_proj"), f"has no factors of model.layers.0.self_attn.q_proj; {JOINED}, so all must have "
         "them"),
        (without("1.mlp.down_proj"), "has no factors of model.layers.1.mlp.down_proj, which lora.target_modules names"),
        (without("0.mlp.down_proj.lora_B"), f"has no tensor {PREFIX}.0.mlp.down_proj.lora_B.weight"),
        (with_shape("1.self_attn.o_proj.lora_A", (2, 64)), "has rank 2 for model.layers.1.self_attn.o_proj; "
         "lora.lora_rank (or rank_pattern) gives it 4"),
        (with_shape("0.self_attn.o_proj.lora_A", (4, 32)), f"{PREFIX}.0.self_attn.o_proj.lora_A.weight is [4, 32]; of "
         "this student it would be [4, 64]"),
        (with_shape("0.self_attn.o_proj.lora_B", (16, 4)), f"{PREFIX}.0.self_attn.o_proj.lora_B.weight is [16, 4]; of "
         "this student it would be [32, 4]"),
        (lambda tensors: tensors | {f"{PREFIX}.2.mlp.down_proj.lora_A.weight": np.ones((4, 48), np.float32)},
         f"has the tensor {PREFIX}.2.mlp.down_proj.lora_A.weight, which is of no layer that lora.target_modules names"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(folder, change, problem):
    path = folder / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    assert problem_with(folder) == problem


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"peft_type": "IA3"}, "holds adapters of the type IA3; must be LORA"),
        ({"use_dora": True}, "adapter_config.json has use_dora = True, which is not supported"),
        ({"bias": "all"}, "adapter_config.json has bias = all; must be none"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.json has modules_to_save = ['lm_head'], which is not "
         "supported"),
        ({"lora_alpha": 16}, "multiplies the adapters of model.layers.0.self_attn.q_proj by 4; lora.lora_alpha and "
         "lora_rank (or patterns, or use_rslora) multiply them by 2"),
        ({"r": 0}, "adapter_config.json has r = 0 and lora_alpha = 8.0; both must be above 0"),
        ({"r": "many"}, "adapter_config.json can't be read (ValueError: invalid literal for int() with base 10: "
         "'many')"),
    ],
)  # fmt: skip
def test_other_configurations_are_refused(folder, change, problem):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert problem_with(folder) == problem


def test_files_that_are_missing_or_damaged(folder):
    whole = folder / "whole"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copytree(folder, whole, ignore=shutil.ignore_patterns("whole"))
        (whole / name).unlink()
        assert problem_with(whole) == f"must be a folder of PEFT adapters; there is no {name} in it"
        shutil.rmtree(whole)
    (folder / "adapter_model.safetensors").write_bytes(b"\x10" * 40)
    assert problem_with(folder).startswith("adapter_model.safetensors can't be read (")


def test_different_ranks_and_scales_are_written_by_name():
    rules = LayerRules(rank=4, alpha=8, rank_pattern={"layers.1.mlp.down_proj": 2}, alpha_pattern={"o_proj": 3})
    config = adapter_config(rules.choose(LAYERS), LAYERS, "student", 4)
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"] == {"model.layers.1.mlp.down_proj": 2}
    assert config["alpha_pattern"] == {f"model.layers.{number}.self_attn.o_proj": 3 for number in range(2)}


def test_partly_adapted_models_are_written_by_whole_names():
    rules = LayerRules(target_regex=r"model\.layers\.(1\.mlp\.down_proj|.\.self_attn\.o_proj)")
    assert adapter_config(rules.choose(LAYERS), LAYERS, "student", 8)["target_modules"] == [
        "model.layers.1.mlp.down_proj",
        "o_proj",
    ]

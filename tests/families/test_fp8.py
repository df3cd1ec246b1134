"""Released FP8 files, with a scale for each block of a matrix, are dequantized when they are read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from families.case import read
from families.text import CASES, build, write
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from megatron_gkd.errors import UserError
from megatron_gkd.models.block_scales import dequantize
from megatron_gkd.models.checkpoint import Checkpoint

BLOCK = (16, 20)  # whose columns divide no matrix of these models, and whose rows not all
CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": list(BLOCK)}
MATRIX = "model.layers.0.mlp.up_proj.weight"
SCALES = f"{MATRIX}_scale_inv"
NOT_CONVERTED = ("embed_tokens.weight", "lm_head.weight", "norm.weight", "gate.weight")


def load_and_export(rank, world_size, path, directory, layout, adapters=None):
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    checkpoint = Checkpoint.open(str(path))
    if adapters is not None:
        checkpoint = checkpoint.with_adapters(adapters, "teacher.teacher_adapters")
    model = MegatronModel.load(checkpoint, initialize_mesh(Layout(**layout), seed=1), BuildOptions())
    export_checkpoint(model, directory)
    destroy_mesh()
    return checkpoint.num_parameters


def is_quantized(name, tensor):
    return tensor.ndim == 2 and name.startswith("model.layers.") and not name.endswith(NOT_CONVERTED)


def by_definition(weight, scales, block_size=BLOCK):
    """Each number times the scale of its block, in the words of DeepSeek-V3's `weight_dequant`."""
    rows, columns = (torch.arange(size) // block for size, block in zip(weight.shape, block_size, strict=True))
    return weight.float() * scales[rows][:, columns]


@pytest.fixture
def quantized(tmp_path):
    """Return a function that writes a checkpoint of random FP8 numbers, and returns it and what it stands for."""

    def of(name, **changes):
        (case,) = [case for case in CASES if case.name == name]
        model = build(case)
        path = write(case, model, tmp_path / "quantized")
        stored, expected = {}, {}
        generator = torch.Generator().manual_seed(3)
        for name, tensor in read(path).items():
            stored[name] = expected[name] = tensor
            if is_quantized(name, tensor):
                grid = [-(-size // block) for size, block in zip(tensor.shape, BLOCK, strict=True)]
                scales = torch.rand(grid, generator=generator) * 0.01 + 0.001
                stored[name] = (torch.randn(tensor.shape, generator=generator) * 20).to(torch.float8_e4m3fn)
                stored[f"{name}_scale_inv"] = scales
                expected[name] = by_definition(stored[name], scales)
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG | changes}))
        return path, stored, expected, model.num_parameters()

    return of


@pytest.mark.families
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deepseek_v3", {"tensor": 2, "sequence_parallel": True}),
        ("kimi_k2", {}),
        ("minimax_m2", {"expert": 2}),
        ("qwen3", {"tensor": 2}),
    ],
)
def test_files_are_read_as_what_they_stand_for(name, layout, quantized, gloo_world, tmp_path):
    path, stored, expected, num_parameters = quantized(name)
    assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values()) > 20
    world = gloo_world(2 if layout else 1)
    assert set(world.run(load_and_export, path, tmp_path / "hf", layout)) == {num_parameters}
    exported = read(tmp_path / "hf")
    assert exported.keys() == expected.keys()
    assert [name for name, tensor in exported.items() if not torch.equal(tensor, expected[name])] == []
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())


@pytest.mark.families
def test_adapters_are_merged_into_dequantized_weights(quantized, gloo_world, tmp_path):
    path, _, expected, _ = quantized("qwen3")
    twin = shutil.copytree(path, tmp_path / "twin")
    save_file(expected, twin / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((twin / "config.json").read_text())
    (twin / "config.json").write_text(json.dumps(config | {"quantization_config": None}))
    rules = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(twin), rules).save_pretrained(tmp_path / "adapters")
    for folder in (path, twin):
        gloo_world(1).run(load_and_export, folder, tmp_path / f"hf-{folder.name}", {}, tmp_path / "adapters")
    found, merged = read(tmp_path / "hf-quantized"), read(tmp_path / "hf-twin")
    assert [name for name, tensor in merged.items() if not torch.equal(tensor, found[name])] == []
    assert not torch.equal(merged[MATRIX.replace("up", "down")], expected[MATRIX.replace("up", "down")])


@pytest.mark.parametrize("shape", [(32, 40), (3, 32, 40)])
def test_the_formula_is_that_of_transformers_and_of_deepseek(shape):
    weight = (torch.randn(shape) * 20).to(torch.float8_e4m3fn)
    scales = torch.rand(*shape[:-2], 2, 2)
    found = Fp8Dequantize(None).convert({"weight$": weight, "weight_scale_inv": scales})["weight"]
    assert torch.equal(dequantize(weight, scales, BLOCK), found)


def test_the_last_blocks_may_be_smaller():
    weight, scales = (torch.randn(37, 41) * 20).to(torch.float8_e4m3fn), torch.rand(3, 3)
    assert torch.equal(dequantize(weight, scales, BLOCK), by_definition(weight, scales))


@pytest.mark.parametrize(
    ("changes", "tensors", "problem"),
    [
        ({"activation_scheme": "static"}, {}, 'its config.json has activation_scheme = "static": is not supported; mu'),
        ({"weight_block_size": None}, {}, "its config.json has weight_block_size = null: is not supported; must be tw"),
        ({"weight_block_size": [0, 2]}, {}, "its config.json has weight_block_size = [0, 2]: is not supported; must b"),
        ({"quant_method": "awq"}, {}, "its config.json has quantization_config = {"),
        ({}, {SCALES: None}, f"model.safetensors: {MATRIX} is of type F8_E4M3; must be a matrix with scales in "),
        ({}, {SCALES: torch.ones(3, 1)}, f"model.safetensors: {SCALES} has the shape (3, 1); must be (3, 2), as "),
        ({}, {SCALES: torch.ones(3, 2).byte()}, f"model.safetensors: {SCALES} is of type U8; must be one of BF16"),
        ({}, {MATRIX: torch.ones(48, 32)}, f"model.safetensors: {SCALES} has scales, but {MATRIX} is no matrix of typ"),
        ({}, {MATRIX: torch.ones(48, 32).to(torch.float8_e5m2)}, f"model.safetensors: {MATRIX} is of type F8_E5M2"),
    ],
)  # fmt: skip
def test_other_schemes_are_refused_in_one_line(changes, tensors, problem, quantized):
    path, stored, *_ = quantized("qwen3", **changes)
    assert MATRIX in stored and SCALES in stored
    kept = {name: tensor for name, tensor in (stored | tensors).items() if tensor is not None}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as error:
        Checkpoint.open(str(path))
    assert str(error.value).startswith(f"{path}: {problem}") and "\n" not in str(error.value)

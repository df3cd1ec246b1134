"""GPT-OSS's released files have four-bit experts (MXFP4), which are dequantized as transformers does it."""

from __future__ import annotations

import json

import pytest
import torch
from families.case import Reference, read
from families.text import CASES, build, write
from logits import logits_of_megatron, relative_error
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

pytestmark = pytest.mark.families

PACKED = 32  # numbers that share a scale
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}


def load_and_export(rank, world_size, path, directory, layout):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    checkpoint = Checkpoint.open(str(path))
    model = MegatronModel.load(checkpoint, initialize_mesh(Layout(**layout), seed=1), BuildOptions())
    logits = logits_of_megatron(model)
    export_checkpoint(model, directory)
    destroy_mesh()
    return logits, checkpoint.num_parameters


@pytest.fixture
def packed(tmp_path):
    """A checkpoint whose experts are random four-bit numbers, with random scales."""
    (case,) = [case for case in CASES if case.name == "gpt_oss"]
    path = write(case, build(case, intermediate_size=64), tmp_path / "packed")
    tensors = {name: tensor.bfloat16() for name, tensor in read(path).items()}  # as transformers reads them
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape  # transposed
        shape = (experts, rows, columns // PACKED)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIG}))
    return path


@pytest.mark.parametrize(("world_size", "layout"), [(1, {}), (2, {"expert": 2})])
def test_packed_experts_are_read_as_by_transformers(world_size, layout, packed, gloo_world, tmp_path):
    unpacked = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.bfloat16, attn_implementation="eager", quantization_config=unpacked
    ).float()
    results = gloo_world(world_size).run(load_and_export, packed, tmp_path / "hf", layout)
    for logits, num_parameters in results:
        assert relative_error(logits, Reference.of_language_model(model).logits) < 1e-5
        assert num_parameters == model.num_parameters()
    exported, expected = read(tmp_path / "hf"), model.state_dict()
    assert exported.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in exported.items())
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())

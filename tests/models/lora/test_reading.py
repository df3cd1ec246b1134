"""Adapters of another model are refused, even if only their values or their base differ."""

from __future__ import annotations

import shutil

import pytest
import torch
from checkpoints import tiny_checkpoint
from models.lora.test_exports import RULES, exported, open_model
from safetensors.torch import load_file, save_file

from megatron_gkd.errors import UserError


def refusal(rank, world_size, path, adapters):
    from megatron_gkd.runtime.mesh import destroy_mesh

    try:
        open_model(path, {"pipeline": world_size}, RULES["all"], adapters=adapters)
    except UserError as error:
        return str(error)
    finally:
        destroy_mesh()


@pytest.fixture(scope="module")
def adapters(gloo_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    path = tiny_checkpoint("qwen3_tied", seed=2)
    gloo_world(1).run(exported, path, {}, RULES["all"], folder)
    return path, folder / "adapters"


def changed(adapters, folder, name, change):
    shutil.copytree(adapters, folder / "changed")
    file = folder / "changed/adapter_model.safetensors"
    tensors = load_file(file)
    tensors[name] = change(tensors[name])
    save_file(tensors, file)
    return folder / "changed"


NAME = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"


def test_factors_that_are_not_shared_are_refused(adapters, gloo_world, tmp_path):
    path, folder = adapters
    other = changed(folder, tmp_path, NAME, lambda tensor: tensor + 1)
    expected = (
        f"lora.adapters = {other}: the factors A of model.layers.1.self_attn.q_proj and model.layers.1.self_attn.v_proj"
        " differ; q_proj, k_proj and v_proj are one matrix in Megatron-Core (linear_qkv) and share one A. Merge the "
        "adapters into their base, or train them with equal factors A"
    )
    assert gloo_world(2).run(refusal, path, other) == [expected] * 2


def test_numbers_that_are_not_finite_are_refused_by_all_ranks(adapters, gloo_world, tmp_path):
    path, folder = adapters
    name = "base_model.model.model.layers.3.mlp.down_proj.lora_B.weight"
    other = changed(folder, tmp_path, name, lambda tensor: torch.full_like(tensor, torch.nan))
    expected = f"lora.adapters = {other}: NaN or infinite values in decoder.layers.3.mlp.linear_fc2.lora_B"
    assert gloo_world(2).run(refusal, path, other) == [expected] * 2


def test_adapters_of_other_weights_are_refused(adapters, gloo_world):
    _, folder = adapters
    other = tiny_checkpoint("qwen3_tied", seed=3)
    expected = f"lora.adapters = {folder}: its adapters are of other weights than those in student.model ({other})"
    assert gloo_world(1).run(refusal, other, folder) == [expected]

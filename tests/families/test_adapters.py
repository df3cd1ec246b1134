"""Adapters of the dense families are those that PEFT puts on transformers' models."""

from __future__ import annotations

import pytest
from families.text import CASES, build, write
from logits import logits_of_megatron, logits_of_transformers, relative_error

from megatron_gkd.checkpoint_format.families import FAMILIES

pytestmark = pytest.mark.families

TESTED = ("llama", "qwen3", "qwen3_moe")  # in tests/models/lora/test_exports.py, under several layouts
OTHERS = [
    case for case in CASES if case.name not in TESTED and case.name in FAMILIES and FAMILIES[case.name].takes_lora
]


def export(rank, world_size, path, folder):
    from megatron_gkd.checkpoint_format.lora_layers import LayerRules
    from megatron_gkd.models.adapter_export import export_adapters
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.lora.options import LoraOptions
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    lora = LoraOptions(LayerRules(rank=4, alpha=8), b_std=0.05, seed=3)
    mesh = initialize_mesh(Layout(), seed=1)
    model = MegatronModel.load(Checkpoint.open(str(path)), mesh, BuildOptions(lora=lora))
    export_adapters(model, folder)
    logits = logits_of_megatron(model)
    destroy_mesh()
    return logits


@pytest.mark.parametrize("case", OTHERS, ids=[case.name for case in OTHERS])
def test_peft_computes_the_same(case, gloo_world, tmp_path):
    path = write(case, build(case), tmp_path / "base")
    (logits,) = gloo_world(1).run(export, path, tmp_path / "adapters")
    expected = logits_of_transformers(path, tmp_path / "adapters")
    assert relative_error(logits, expected) < 2e-6
    assert relative_error(logits_of_transformers(path), expected) > 1e-2, "the adapters must show"

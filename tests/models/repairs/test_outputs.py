"""Exports and logits that are wrong without a repair."""

from __future__ import annotations

import pytest
import torch
from families.case import read
from families.text import CASES, build, write
from logits import logits_of_megatron, logits_of_transformers, relative_error


def checkpoint(family, **changes):
    (case,) = (case for case in CASES if case.name == family)
    return write(case, build(case, **changes))


def exported_and_logits(rank, world_size, path, layout, without=None):
    from megatron_gkd.models import repairs
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    repair = getattr(repairs, without or "repair")
    try:
        if without is not None:
            setattr(repairs, without, lambda *args: None)
        model = MegatronModel.load(Checkpoint.open(str(path)), mesh, BuildOptions())
        return {name: tensor.clone() for name, tensor in model.named_tensors()}, logits_of_megatron(model)
    finally:
        setattr(repairs, without or "repair", repair)
        destroy_mesh()


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}], ids=["one process", "TP2", "PP2"])
def test_glm4_is_exported_with_one_matrix_for_gate_and_up(layout, gloo_world):
    path = checkpoint("glm4", num_hidden_layers=2)
    expected = read(path)
    for found, _ in gloo_world(2 if layout else 1).run(exported_and_logits, path, layout):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_glm4_is_exported_with_other_keys_without_the_repair(gloo_world):
    path = checkpoint("glm4", num_hidden_layers=2)
    (found, _), *_ = gloo_world(1).run(exported_and_logits, path, {}, "export_gate_up_as_one")
    assert found.keys() ^ read(path).keys() == {
        f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in (0, 1) for name in ("gate", "up", "gate_up")
    }


@pytest.mark.parametrize("family", ["glm4_moe_lite", "deepseek_v3"])
def test_latent_norms_have_an_epsilon_of_their_own(family, gloo_world):
    path = checkpoint(family, rms_norm_eps=1e-2)
    expected = logits_of_transformers(path)
    (_, found), *_ = gloo_world(1).run(exported_and_logits, path, {})
    assert relative_error(found, expected) < 1e-5
    (_, unrepaired), *_ = gloo_world(1).run(exported_and_logits, path, {}, "set_latent_norm_eps")
    assert relative_error(unrepaired, expected) > 1e-4


def test_sinks_of_transformer_engine_are_marked():
    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.models.repairs.sinks import mark_sinks

    chunk = torch.nn.Module()
    chunk.core_attention = torch.nn.Module()
    chunk.core_attention.softmax_offset = torch.nn.Parameter(torch.zeros(2))
    mark_sinks(chunk)
    assert chunk.core_attention.softmax_offset.tensor_model_parallel

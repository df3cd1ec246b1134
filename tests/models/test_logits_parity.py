"""The sharded Megatron model gives the logits that transformers gives, for every family and layout."""

from __future__ import annotations

import json
import shutil

import pytest
from checkpoints import tiny_checkpoint
from logits import logits_of_megatron, logits_of_transformers, relative_error

from megatron_gkd.checkpoint_format.config_file import ROPE_TYPES

FAMILIES = ["llama", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "qwen3_moe"]
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "EP2": (2, {"expert": 2}),
}


def megatron_logits(rank, world_size, path, layout):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    result = logits_of_megatron(MegatronModel.load(Checkpoint.open(str(path)), mesh, BuildOptions()))
    destroy_mesh()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family, gloo_world):
    expected = logits_of_transformers(tiny_checkpoint(family))
    for name, (world_size, layout) in LAYOUTS.items():
        if layout.get("expert") and family != "qwen3_moe":
            continue
        if family == "qwen3_moe" and layout.get("tensor") and not layout.get("sequence_parallel"):
            continue  # Megatron's MoE asks for sequence parallelism beside tensor parallelism
        results = gloo_world(world_size).run(megatron_logits, tiny_checkpoint(family), layout)
        found = [result for result in results if result is not None]
        assert found, f"{name}: no rank had logits"
        for logits in found:
            assert logits.shape == expected.shape
            error = relative_error(logits, expected)
            assert error < 1e-5, f"{name}: relative error {error:.1e}"


ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
}


@pytest.mark.parametrize("rope_type", ROPE_TYPES)
def test_every_rope_type_that_is_allowed_is_that_of_transformers(rope_type, gloo_world, tmp_path):
    source = tiny_checkpoint("qwen2")
    path = tmp_path / "model"
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text())
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **ROPES[rope_type]}
    (path / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    expected = logits_of_transformers(path)
    (found,) = gloo_world(1).run(megatron_logits, path, {})
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    if rope_type != "default":
        assert (expected - logits_of_transformers(source)).abs().max() > 1e-3 * expected.abs().max(), "it must show"

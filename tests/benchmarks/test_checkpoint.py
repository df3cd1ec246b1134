"""The benchmark of checkpoints runs, with a tiny model, and writes what it found."""

from __future__ import annotations

import json


def measure(rank, world_size, folder):
    from benchmarks import checkpoint

    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    recipe = checkpoint.recipe_of(world_size)
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), seed=1)
    sizes = dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    found = checkpoint.measure(mesh, recipe, sizes | {"num_hidden_layers": 2, "vocab_size": 128}, folder)
    destroy_mesh()
    return found


def test_a_tiny_model(gloo_world, tmp_path):
    from benchmarks import checkpoint
    from benchmarks.environment import describe

    from megatron_gkd.runtime import portability

    found = gloo_world(2).run(measure, tmp_path)[0]
    assert list(tmp_path.iterdir()) == []
    layers = 2 * (32 * 64 * 2 + 32 * 32 * 2 + 3 * 32 * 48 + 2 * 32 + 2 * 16)
    assert found["parameters"] == 128 * 32 + layers + 32
    assert 14 * found["parameters"] < found["bytes"] < 14 * found["parameters"] + 400_000
    times = {name: value for name, value in found.items() if name.endswith("_s") and name != "step_meanwhile_s"}
    assert len(times) == 7 and all(value > 0 for value in times.values())
    assert found["async_stall_s"] < found["async_whole_s"]
    text = checkpoint.write(
        {"environment": describe(portability.device()) | {"processes": 2}, "checkpoint": found}, tmp_path
    )
    written = {path.suffix: path.read_text() for path in tmp_path.iterdir()}
    assert json.loads(written[".json"])["checkpoint"] == found and written[".md"] == text
    assert "Checkpoint, bf16, TP2" in text

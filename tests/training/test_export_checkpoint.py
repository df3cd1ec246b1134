"""A checkpoint exported under another layout, or on one process, is the run's own export to the bit."""

from __future__ import annotations

import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import EP2, PP2, SP, TP2
from safetensors.torch import load_file
from training_layouts import build, recipe_of

from megatron_gkd.errors import RunStopped

PLAIN = {"teacher": {"teacher_kind": "none", "teacher_model": None}}


def save_and_export(rank, world_size, model, changes, directory):
    """One step, saved as a checkpoint and exported as a run does it."""
    from megatron_gkd.models.adapter_export import export_adapters
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    apply_workarounds()
    _, student, _, batches = build(model, None, changes | PLAIN)
    microbatches = next(iter(batches))
    student.compute_gradients(microbatches, [None] * len(microbatches))
    student.update()
    saver, saved = Saver(CheckpointFolder(directory / "checkpoints"), is_asynchronous=False), Saved(student)
    values = {"identity": {}, "progress": {"step": 1, "updates": 1}}
    assert saver.save(1, saved.to_write(), saved.description() | values)
    export_checkpoint(student.model, directory / "hf")
    if student.model.adapters is not None:
        export_adapters(student.model, directory / "adapters")
    destroy_mesh()


def export_alone(rank, world_size, model, changes, path, output, has_adapters=False):
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.export_checkpoint import export_student

    recipe = recipe_of(changes | {"student": {"model": str(model)}})
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), seed=1)
    try:
        export_student(recipe, mesh, path, output, has_adapters=has_adapters)
    finally:
        destroy_mesh()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
CASES = [
    ("qwen3", TP2, {}, "bf16"),
    ("qwen3_tied", VPP2, {}, "bf16"),
    ("qwen3_tied", TP2, VPP2, "fp32"),
    ("qwen3_moe", EP2, {}, "bf16"),
    ("qwen3_moe", TP2 | SP | EP2, PP2, "bf16"),
]


@pytest.mark.parametrize(("family", "parallel", "other", "dtype"), CASES)
def test_the_export_is_the_same(family, parallel, other, dtype, gloo_world, tmp_path):
    model, train = tiny_checkpoint(family, seed=2), {"train": {"dtype": dtype}}
    gloo_world(2).run(save_and_export, model, train | {"parallel": parallel}, tmp_path)
    path = tmp_path / "checkpoints/step-000001"
    gloo_world(2 if other else 1).run(export_alone, model, train | {"parallel": other}, path, tmp_path / "again")
    expected, found = contents(tmp_path / "hf"), contents(tmp_path / "again")
    assert {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json"} <= expected.keys()
    assert found == expected
    assert found["model.safetensors"] != (model / "model.safetensors").read_bytes()


LORA = {"lora_rank": 4, "lora_dropout": 0}


@pytest.mark.parametrize(("family", "parallel", "other"), [("qwen3_tied", TP2 | SP, VPP2), ("qwen3_moe", EP2, {})])
def test_adapters_are_merged_into_the_export(family, parallel, other, gloo_world, tmp_path):
    model, lora = tiny_checkpoint(family, seed=2), {"lora": LORA, "train": {"dtype": "bf16"}}
    gloo_world(2).run(save_and_export, model, lora | {"parallel": parallel}, tmp_path)
    path = tmp_path / "checkpoints/step-000001"
    gloo_world(2 if other else 1).run(export_alone, model, lora | {"parallel": other}, path, tmp_path / "again", False)
    expected, found = contents(tmp_path / "hf"), contents(tmp_path / "again")
    assert found == expected
    trained, base = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", model))
    changed = {name for name, tensor in base.items() if not torch.equal(trained[name], tensor.bfloat16())}
    assert changed == {name for name in base if name.endswith("_proj.weight")}


@pytest.mark.parametrize(("name", "has_adapters"), [("adapters", True), ("hf", False)])
def test_adapters_are_exported_alone_or_merged(name, has_adapters, gloo_world, tmp_path):
    model, changes = tiny_checkpoint("qwen3", seed=2), {"lora": {"lora_rank": 4}, "train": {"dtype": "fp32"}}
    gloo_world(2).run(save_and_export, model, changes | {"parallel": TP2}, tmp_path)
    path = tmp_path / "checkpoints/step-000001"
    gloo_world(1).run(export_alone, model, changes, path, tmp_path / "again", has_adapters)
    expected, found = contents(tmp_path / name), contents(tmp_path / "again")
    assert ("adapter_model.safetensors" in expected) == has_adapters and "tokenizer.json" in expected
    assert found == expected


@pytest.mark.parametrize("change", ["wider", "tied"])
def test_a_checkpoint_of_another_model_is_refused(change, gloo_world, tmp_path):
    gloo_world(2).run(save_and_export, tiny_checkpoint("qwen3", seed=2), {}, tmp_path)
    other = {"wider": lambda: tiny_checkpoint("qwen3", seed=2, hidden_size=48)}
    other["tied"] = lambda: tiny_checkpoint("qwen3_tied", seed=2)
    path = tmp_path / "checkpoints/step-000001"
    with pytest.raises(RunStopped, match="step-000001: can't be loaded into this model") as error:
        gloo_world(2).run(export_alone, other[change](), {}, path, tmp_path / "again")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert not (tmp_path / "again").exists()

"""Exports can be opened by transformers and are the model that was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from checkpoints import tiny_checkpoint
from rows import RandomRows
from safetensors.torch import load_file
from training_layouts import build
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from megatron_gkd.ops import reference

TP2_PP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}
RECIPES = {
    "TP2+SPxPP2": (4, "qwen3_tied", {"parallel": TP2_PP2}),
    "VPP2, untied": (
        2,
        "llama",
        {"parallel": {k: 2 for k in ("pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size")}},
    ),
    "EP2": (2, "qwen3_moe", {"parallel": {"expert_model_parallel_size": 2}}),
    "overlapped": (2, "qwen3", {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
}


def export_untrained(rank, world_size, model, directory, changes):
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime import current_phase
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, _ = build(model, None, changes | {"teacher": {"teacher_kind": "none"}})
    with mock.patch.object(current_phase, "note_progress") as note_progress:
        export_checkpoint(student.model, directory)
    destroy_mesh()
    return note_progress.call_count


def train_and_export(rank, world_size, model, teacher, directory, changes):
    """Three steps, an export, and the validation totals of the model that was exported."""
    from training_layouts import recipe_of

    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.loader import validation_batches
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh

    mesh, student, teacher, batches = build(model, teacher, changes)
    for microbatches in batches:
        with teacher.resident():
            signals = teacher.score(microbatches)
        student.compute_gradients(microbatches, signals)
        student.update()
    student.gather_parameters()
    export_checkpoint(student.model, directory)
    totals: dict[str, float] = {}
    config = BatchConfig.from_recipe(recipe_of(changes), mesh, pad_token_id=0)
    for microbatches in validation_batches(RandomRows(11, seed=9), config):
        with teacher.resident():
            signals = teacher.score(microbatches)
        for name, value in student.evaluate(microbatches, signals).items():
            totals[name] = totals.get(name, 0.0) + value
    destroy_mesh()
    return totals


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_tied", "qwen3", "qwen3_tied", "qwen3_moe"])
def test_an_untrained_model_is_exported_bit_by_bit(family, gloo_world, tmp_path):
    source, directory = tiny_checkpoint(family), tmp_path / "export"
    changes = {"parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}}
    progress = gloo_world(2).run(export_untrained, source, directory, changes)
    before, after = (
        load_file(path / "model.safetensors") for path in (source, next(directory.glob("*.safetensors")).parent)
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    assert progress[0] >= len(after), "an export that takes long is no hang"


def test_a_generation_config_that_transformers_refuses_to_save_is_copied(gloo_world, tmp_path):
    source, directory = tmp_path / "source", tmp_path / "export"
    shutil.copytree(tiny_checkpoint("qwen3"), source)
    text = '{"temperature": 0.6, "top_p": 0.95, "top_k": 20, "eos_token_id": [2, 0], "of_my_own": 1}'
    (source / "generation_config.json").write_text(text)
    gloo_world(1).run(export_untrained, source, directory, {})
    assert (directory / "generation_config.json").read_text() == text


def train_with_a_tokenizer_that_can_not_be_saved(rank, world_size, recipe):
    from transformers import PreTrainedTokenizerBase

    from megatron_gkd.config.schema import Recipe
    from megatron_gkd.errors import UserError
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.training.run import run
    from megatron_gkd.training.run_folder import RunFolder

    def refuse(self, directory):
        raise ValueError("the chat template\nis of two kinds")

    recipe = Recipe.model_validate(recipe)
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), seed=1)
    saved, PreTrainedTokenizerBase.save_pretrained = PreTrainedTokenizerBase.save_pretrained, refuse
    try:
        with RunFolder(Path(recipe.output.output_dir), is_main=rank == 0) as folder:
            run(recipe, mesh, folder)
    except UserError as error:
        return str(error)
    finally:
        PreTrainedTokenizerBase.save_pretrained = saved
        destroy_mesh()


def test_a_checkpoint_that_cannot_be_exported_is_refused_before_the_first_step(gloo_world, tmp_path):
    source, output = tiny_checkpoint("qwen3"), tmp_path / "run"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n')
    recipe = {
        "student": {"model": str(source)},
        "teacher": {"teacher_kind": "none"},
        "distill": {},
        "parallel": {"tensor_model_parallel_size": 2},
        "data": {"dataset": [str(tmp_path / "rows.jsonl")], "max_length": 64, "dataset_cache_dir": str(tmp_path / "c")},
        "train": {"global_batch_size": 1, "train_iters": 1, "dtype": "fp32"},
        "output": {"output_dir": str(output), "tensorboard": False},
    }
    messages = gloo_world(2).run(train_with_a_tokenizer_that_can_not_be_saved, recipe)
    message = "transformers can't write it into an export (ValueError: the chat template is of two kinds)"
    assert messages == [f"the tokenizer in {source}: {message}"] * 2
    assert sorted(path.name for path in output.iterdir()) == ["exit.json"]


@pytest.mark.parametrize("layout", RECIPES)
def test_the_export_has_the_validation_loss_of_the_run(layout, gloo_world, tmp_path):
    world_size, family, changes = RECIPES[layout]
    changes = changes | {"train": {"global_batch_size": 8}}
    directory = tmp_path / "export"
    teacher_path = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=6, hidden_size=48)
    source = tiny_checkpoint(family, seed=2)
    totals = gloo_world(world_size).run(train_and_export, source, teacher_path, directory, changes)[0]

    assert AutoTokenizer.from_pretrained(directory).get_vocab() == AutoTokenizer.from_pretrained(source).get_vocab()
    assert AutoTokenizer.from_pretrained(directory).chat_template == AutoTokenizer.from_pretrained(source).chat_template
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 2
    assert json.loads((directory / "config.json").read_text())["architectures"]
    assert not list(tmp_path.glob("*.unfinished"))

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32).eval() for p in (directory, teacher_path)
    )
    untrained = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    rows = RandomRows(11, seed=9)
    sums = {"new": 0.0, "old": 0.0, "cross_entropy": 0.0}
    for sample in (rows[i] for i in range(len(rows))):
        inputs, labels = torch.from_numpy(sample.input_ids)[None], torch.from_numpy(sample.labels)
        counts = labels != -100
        with torch.no_grad():
            new, old, goal = (model(inputs).logits[0][counts].double() for model in (student, untrained, teacher))
        sums["new"] += reference.divergence(new, goal, beta=0.5, temperature=0.9).sum().item()
        sums["old"] += reference.divergence(old, goal, beta=0.5, temperature=0.9).sum().item()
        sums["cross_entropy"] += torch.nn.functional.cross_entropy(new, labels[counts], reduction="sum").item()
    assert totals["divergence"] == pytest.approx(sums["new"], rel=1e-5)
    assert totals["cross_entropy"] == pytest.approx(sums["cross_entropy"], rel=1e-5)
    assert sums["new"] < 0.99 * sums["old"], "three steps must show"


def export_into_a_file(rank, world_size, model, directory):
    from megatron_gkd.errors import UserError
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, _, _ = build(model, None, {"teacher": {"teacher_kind": "none"}})
    with pytest.raises(UserError) as error:
        export_checkpoint(student.model, directory)
    destroy_mesh()
    return str(error.value)


def test_an_unwritable_folder_is_the_same_error_in_all_ranks(gloo_world, tmp_path):
    (tmp_path / "file").write_text("")
    messages = gloo_world(2).run(export_into_a_file, tiny_checkpoint("qwen3", seed=2), tmp_path / "file/hf", timeout=60)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{tmp_path}/file/hf: can't be written to (") and "\n" not in messages[0]

"""Adapters that are merged into a checkpoint give the model that transformers and PEFT build from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from logits import logits_of_megatron, logits_of_transformers, relative_error
from models.lora.test_exports import open_model
from safetensors.torch import load_file, save_file
from training_layouts import recipe_of
from transformers import AutoModelForCausalLM

from megatron_gkd.errors import UserError


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory) -> Path:
    """Adapters as PEFT makes them: q and v alone, each with a factor A of its own, ranks and scales of their own."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("peft")
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={r"layers\.1\.self_attn\.q_proj": 2},
        alpha_pattern={"down_proj": 3},
        use_rslora=True,
        init_lora_weights=False,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("qwen3_tied", seed=2), dtype=torch.float32)
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def export(rank, world_size, path, folder):
    from megatron_gkd.models.adapter_export import export_adapters
    from megatron_gkd.runtime.mesh import destroy_mesh

    export_adapters(open_model(path, {}, {}, b_std=0.05, seed=3), folder)
    destroy_mesh()


@pytest.fixture(scope="module")
def of_mixture(gloo_world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "adapters"
    gloo_world(1).run(export, tiny_checkpoint("qwen3_moe", seed=2), folder)
    return folder


def logits_of_merged(rank, world_size, path, layout, adapters):
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh

    mesh = initialize_mesh(Layout(**layout), seed=1)
    checkpoint = Checkpoint.open(str(path)).with_adapters(adapters, "teacher.teacher_adapters")
    found = logits_of_megatron(MegatronModel.load(checkpoint, mesh, BuildOptions()))
    destroy_mesh()
    return found


LAYOUTS = {
    "TP2": ("qwen3_tied", {"tensor": 2}),
    "PP2": ("qwen3_tied", {"pipeline": 2}),
    "TP2+SPxEP2": ("qwen3_moe", {"tensor": 2, "sequence_parallel": True, "expert": 2}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logits_are_those_of_transformers_and_peft(layout, of_peft, of_mixture, gloo_world):
    family, layout = LAYOUTS[layout]
    path, adapters = tiny_checkpoint(family, seed=2), of_mixture if family == "qwen3_moe" else of_peft
    expected = logits_of_transformers(path, adapters)
    assert relative_error(logits_of_transformers(path), expected) > 1e-2, "the adapters must show"
    for found in gloo_world(2).run(logits_of_merged, path, layout, adapters):
        assert found is None or relative_error(found, expected) < 2e-6


def changed(folder: Path, target: Path, config: dict | None = None, **tensors) -> Path:
    """A copy of adapters with other keys, and with tensors added, or left out (None)."""
    target.mkdir()
    keys = json.loads((folder / "adapter_config.json").read_text()) | (config or {})
    (target / "adapter_config.json").write_text(json.dumps(keys))
    stored = load_file(folder / "adapter_model.safetensors") | tensors
    save_file({k: v for k, v in stored.items() if v is not None}, target / "adapter_model.safetensors")
    return target


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
WRONG = {
    "use_dora = True, which is not supported": {"config": {"use_dora": True}},
    "bias = all; must be none": {"config": {"bias": "all"}},
    "without the other factor of model.layers.0.self_attn.q_proj": {Q + "B.weight": None},
    rf"{Q}A.weight is \[4, 31\]; of this model it would be \[4, 32\]": {Q + "A.weight": torch.zeros(4, 31)},
    "but the model has no model.layers.9.mlp.up_proj.weight": {
        "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 32)
    },
    "lora_embedding_A, which is not a factor": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4)},
}


@pytest.mark.parametrize("message", WRONG)
def test_adapters_that_do_not_fit_are_refused(message, of_peft, tmp_path):
    from megatron_gkd.models.checkpoint import Checkpoint

    folder = changed(of_peft, tmp_path / "adapters", **WRONG[message])
    checkpoint = Checkpoint.open(str(tiny_checkpoint("qwen3_tied", seed=2)))
    with pytest.raises(UserError, match=f"^lora.adapters = {folder}: .*{message}") as error:
        checkpoint.with_adapters(folder, "lora.adapters")
    assert "\n" not in str(error.value)


def test_adapters_of_other_weights_are_refused(of_mixture):
    from megatron_gkd.models.checkpoint import Checkpoint

    other = Checkpoint.open(str(tiny_checkpoint("qwen3_moe", seed=3)))
    with pytest.raises(UserError, match="its adapters are of other weights than those in"):
        other.with_adapters(of_mixture, "lora.adapters")


def teacher_of(rank, world_size, path, adapters):
    """The kinds of teacher that a student with adapters has, whose base the teacher's model is."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.runtime.nodes import Nodes
    from megatron_gkd.training.build import build_student
    from megatron_gkd.training.build_teacher import begins_as_student, build_teacher, open_teachers

    mesh, kinds, student = initialize_mesh(Layout(), seed=1), [], Checkpoint.open(str(path))
    for own in ({}, {"teacher_adapters": str(adapters)}):
        recipe = recipe_of({"lora": {"lora_rank": 2}, "teacher": {"teacher_model": str(path)} | own})
        teachers = open_teachers(recipe, Nodes.alone())
        built = build_teacher(recipe, mesh, build_student(recipe, mesh, student, 99, train_iters=3), teachers)
        adapted = teachers["teacher"].adapters
        folder = None if adapted is None else Path(adapted.folder)
        kinds.append((type(built).__name__, begins_as_student(recipe.teacher, student, teachers), folder))
    destroy_mesh()
    return kinds


def test_a_teacher_with_adapters_differs_from_its_base(of_peft, gloo_world):
    (kinds,) = gloo_world(1).run(teacher_of, tiny_checkpoint("qwen3_tied", seed=2), of_peft)
    assert kinds == [("SelfTeacher", True, None), ("LocalTeacher", False, of_peft)]


PROMPTS = [[5, 9, 33, 7], [60, 3]]


def answers_of(rank, world_size, path, adapters, source):
    """Greedy answers of `generate`'s engine."""
    from types import SimpleNamespace

    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.runtime.nodes import Nodes
    from megatron_gkd.training.build_teacher import open_teachers
    from megatron_gkd.training.generation_engine import build_generation_engine

    mesh, teacher = initialize_mesh(Layout(tensor=world_size), seed=1), {"teacher_model": str(path)}
    changes = {"teacher": teacher | {"teacher_adapters": str(adapters)}}
    if source == "student":
        changes = {"teacher": teacher, "lora": {"adapters": str(adapters)}}
    recipe = recipe_of(changes)
    teachers = open_teachers(recipe, Nodes.alone())
    models = SimpleNamespace(student=Checkpoint.open(str(path)), teachers=teachers, images=None)
    engine = build_generation_engine(source, recipe, mesh, models)
    sampling = Sampling(max_completion_length=8, temperature=0, ignore_eos=True)
    found = [one.token_ids for one in engine.generate(PROMPTS, sampling, [0] * len(PROMPTS))]
    destroy_mesh()
    return found


@pytest.mark.parametrize("source", ["teacher", "student"])
def test_generate_answers_with_adapters(source, of_peft, gloo_world):
    from peft import PeftModel

    path = tiny_checkpoint("qwen3_tied", seed=2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, of_peft).eval()
    greedy = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = [model.generate(input_ids=torch.tensor([p]), **greedy)[0, len(p) :].tolist() for p in PROMPTS]
    assert gloo_world(2).run(answers_of, path, of_peft, source)[1] == expected

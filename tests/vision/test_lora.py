"""Adapters of multimodal students under every layout, and opened by PEFT: of the language model, and of the tower."""

from __future__ import annotations

import functools

import pytest
import torch
from families.vision import compute_logits, open_reference
from layouts import CP2, PP2, SP, TP2
from logits import relative_error
from lora_runs import LORA, named_gradients
from safetensors.torch import load_file
from training_layouts import TOLERANCE
from vision.vision_runs import build_with_random_b, merged
from vision_checkpoints import tiny_vision_checkpoint

LANGUAGE = {"lora": LORA}
EVERYTHING = {"lora": LORA, "train": {"freeze_vit": False, "freeze_aligner": False, "vit_lr": 1e-3}}
TOWER = {"lora": LORA, "train": {"freeze_vit": False, "freeze_llm": True}}
NAMED = {"lora": LORA | {"target_modules": ["q_proj", "k_proj", "v_proj", "attn.qkv"]}}
# family, adapters and the number of factors
RUNS = {
    "qwen2_5_vl": ("qwen2_5_vl", LANGUAGE, 4 * 7 * 2),
    "internvl_qwen3": ("internvl_qwen3", LANGUAGE, 4 * 7 * 2),
    "qwen3_vl, everything": ("qwen3_vl", EVERYTHING, 4 * 7 * 2 + 3 * 4 * 2 + 3 * 2 * 2),
    "qwen2_5_vl, tower": ("qwen2_5_vl", TOWER, 2 * 5 * 2),
    "qwen3_vl, by name": ("qwen3_vl", NAMED, 4 * 3 * 2 + 3 * 2),
}
LAYOUTS = {
    "TP2+SP": ("qwen2_5_vl", {"parallel": TP2 | SP}),
    "PP2": ("internvl_qwen3", {"parallel": PP2}),
    "CP2": ("qwen2_5_vl", {"parallel": CP2}),
    "TP2+SP, tower too": ("qwen3_vl, everything", {"parallel": TP2 | SP}),
    "PP2, tower alone": ("qwen2_5_vl, tower", {"parallel": PP2}),
    "DP2, tower too": ("qwen3_vl, everything", {}),
}


def train(rank, world_size, path, changes, folder=None):
    """Train three steps; return losses, gradient norms and the factors' gradients. Export both ways into `folder`."""
    from megatron_gkd.models.adapter_export import export_adapters
    from megatron_gkd.models.export import export_checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh

    student, steps = build_with_random_b(path, changes)
    records = []
    for microbatches in steps:
        totals = student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
        gradients = named_gradients(student)
        records.append((totals["loss"], student.update(), gradients if rank == 0 else None))
    if folder is not None:
        student.gather_parameters()
        export_adapters(student.model, folder / "adapters")
        export_checkpoint(student.model, folder / "merged")
        base = dict(student.model.base_tensors())
        assert all(torch.equal(base[name], tensor) for name, tensor in load_file(path / "model.safetensors").items())
    destroy_mesh()
    return records


@pytest.fixture(scope="module")
def one_process(gloo_world, tmp_path_factory):
    @functools.cache
    def of(run: str):
        family, changes, _ = RUNS[run]
        folder = tmp_path_factory.mktemp("run")
        return gloo_world(1).run(train, tiny_vision_checkpoint(family, seed=2), changes, folder)[0], folder

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(layout, gloo_world, one_process):
    run, parallel = LAYOUTS[layout]
    family, changes, num_factors = RUNS[run]
    found = gloo_world(2).run(train, tiny_vision_checkpoint(family, seed=2), merged(changes, parallel))[0]
    for step, (a, b) in enumerate(zip(found, one_process(run)[0], strict=True)):
        assert a[:2] == pytest.approx(b[:2], rel=TOLERANCE), f"step {step}"
        assert a[2].keys() == b[2].keys() and len(b[2]) == num_factors
        for name, gradient in b[2].items():
            assert (a[2][name] - gradient).norm() <= TOLERANCE * gradient.norm(), f"step {step}: {name}"


@pytest.mark.parametrize("run", RUNS)
def test_exports_open_in_peft_and_transformers(run, one_process):
    from peft import PeftModel

    family, _, num_factors = RUNS[run]
    folder, base = one_process(run)[1], tiny_vision_checkpoint(family, seed=2)
    whole = compute_logits(open_reference(folder / "merged"))
    adapted = PeftModel.from_pretrained(open_reference(base), folder / "adapters", is_trainable=True)
    assert sum("lora_" in name for name, _ in adapted.named_parameters()) == num_factors
    assert relative_error(compute_logits(adapted), whole) <= 2e-6
    assert relative_error(compute_logits(open_reference(base)), whole) > 1e-3
    before, after = (load_file(path / "model.safetensors") for path in (base, folder / "merged"))
    assert before.keys() == after.keys()
    changed = [name for name, tensor in before.items() if not torch.equal(tensor, after[name])]
    assert len(changed) == num_factors // 2


def test_a_teacher_is_merged_with_adapters(one_process):
    """The files of these checkpoints have other names for the modules than transformers, and so than PEFT."""
    from megatron_gkd.models.checkpoint import Checkpoint

    folder, base = one_process("qwen2_5_vl")[1], tiny_vision_checkpoint("qwen2_5_vl", seed=2)
    checkpoint = Checkpoint.open(str(base)).with_adapters(folder / "adapters", "teacher.teacher_adapters")
    expected = load_file(folder / "merged" / "model.safetensors")
    for name, tensor in load_file(base / "model.safetensors").items():
        assert torch.allclose(checkpoint.adapters.merge(name, tensor), expected[name], rtol=0, atol=1e-6), name


def test_adapters_of_the_tower_resume(gloo_world, tmp_path):
    from vision.test_checkpoints import train as train_and_save

    path = tiny_vision_checkpoint("qwen3_vl_tied", seed=2)
    expected = gloo_world(2).run(train_and_save, path, merged(EVERYTHING, {"parallel": PP2}), tmp_path, resumes=False)
    found = gloo_world(2).run(train_and_save, path, merged(EVERYTHING, {"parallel": PP2}), tmp_path, resumes=True)
    assert found[0][0] == expected[0][0]
    assert all(torch.equal(found[0][1][name], weight) for name, weight in expected[0][1].items())

"""What training adapters holds in memory, the base as a teacher without a copy, and dropout."""

from __future__ import annotations

import shutil

import pytest
import torch
from layouts import CP2, PP2, RECOMPUTE, SP, TP2
from lora_runs import build_with_random_b, models, train_steps, with_lora
from rows import RandomRows
from training_layouts import assert_equal_runs

VPP2 = {"virtual_pipeline_model_parallel_size": 2}


def bytes_held(rank, world_size, model, changes):
    """Numbers of the adapters on this rank, and bytes of what training holds for them and for the base."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.workarounds import adam_states

    _, student, _teacher, batches = build_with_random_b(model, None, changes | {"teacher": {"teacher_kind": "none"}})
    before = {name: tensor.clone() for name, tensor in student.model.base_tensors()}
    for microbatches in batches:
        student.compute_gradients(microbatches, [None] * len(microbatches))
        assert student.update() > 0
    student.gather_parameters()
    assert all(torch.equal(before[name], tensor) for name, tensor in student.model.base_tensors())
    parameters = [p for chunk in student.model.chunks for p in chunk.parameters()]
    trained = [p for p in parameters if p.requires_grad]
    frozen = [p for p in parameters if not p.requires_grad]
    assert {id(p) for p in trained} == {id(f.parameter) for f in student.model.adapters.factors}
    assert all(p.grad is None and not hasattr(p, "main_grad") for p in frozen)
    buffers = [b for chunk in student.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
    states = [(p, s) for p, s in adam_states(student.optimizer)]
    found = {
        "adapters": sum(p.numel() for p in trained),
        "base": sum(p.numel() for p in frozen),
        "gradients": sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        "moments": sum(t.numel() * t.element_size() for _, s in states for t in s.values() if t.dim()),
        "masters": sum(
            p.numel() * p.element_size() for p, _ in states if p.data_ptr() not in {t.data_ptr() for t in parameters}
        ),
    }
    destroy_mesh()
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("lora_dtype", [None, "fp32"])
def test_only_adapters_have_gradients_masters_and_moments(dtype, distributed, lora_dtype, gloo_world):
    if dtype == "fp32" and lora_dtype is not None:
        return
    changes = with_lora(
        {"train": {"dtype": dtype}, "parallel": {"distributed_optimizer": distributed}}, lora_dtype=lora_dtype
    )
    (found,) = gloo_world(1).run(bytes_held, models("mixture")[0], changes)
    adapters = found["adapters"]
    assert adapters < 0.25 * found["base"]
    padding = 4 * 2 * 256  # of the distributed optimizer's buffers
    assert 4 * adapters <= found["gradients"] <= 4 * adapters + (padding if distributed else 0)
    assert found["moments"] == 2 * 4 * adapters
    has_masters = dtype == "bf16" and lora_dtype is None
    assert found["masters"] == (4 * adapters if has_masters else 0)


BASE_AS_TEACHER = {
    "one process": (1, {}),
    "recompute": (1, {"parallel": RECOMPUTE}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2xVPP2": (2, {"parallel": PP2 | VPP2}),
    "CP2": (2, {"parallel": CP2}),
}


@pytest.mark.parametrize("layout", BASE_AS_TEACHER)
def test_the_base_as_teacher_needs_no_second_copy(layout, gloo_world, tmp_path):
    """It scores bit by bit as a copy beside the student does, from its first step to its last."""
    path, _ = models("tied")
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    size, changes = BASE_AS_TEACHER[layout]
    changes = with_lora(changes)
    expected, found = (gloo_world(size).run(train_with, path, teacher, changes) for teacher in (copy, path))
    assert expected[0]["kind"] == "LocalTeacher" and found[0]["kind"] == "SelfTeacher"
    assert [one["records"] for one in found] == [one["records"] for one in expected]
    fixed = {"teacher": {"teacher_kind": "self", "teacher_model": str(path)}}
    opsd = gloo_world(size).run(train_with, path, None, changes | fixed)
    assert [one["records"] for one in opsd] == [one["records"] for one in expected]


def train_with(rank, world_size, student, teacher, changes):
    """Losses and norms of three steps."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    rows = RandomRows(count=24, privileged=True)
    _, student, teacher, batches = build_with_random_b(student, teacher, changes, rows=rows)
    records = []
    for microbatches in batches:
        with teacher.resident():
            signals = teacher.score(microbatches)
        records.append((student.compute_gradients(microbatches, signals), student.update()))
    destroy_mesh()
    return {"kind": type(teacher).__name__, "records": records}


def test_dropout_is_the_same_when_recomputed(gloo_world):
    student, teacher = models("tied")
    runs = [
        gloo_world(1).run(train_steps, student, teacher, with_lora(changes, lora_dropout=0.3))[0]
        for changes in ({}, {"parallel": RECOMPUTE})
    ]
    assert_equal_runs(*runs)
    plain = gloo_world(1).run(train_steps, student, teacher, with_lora({}))[0]
    assert plain[0]["totals"]["loss"] != pytest.approx(runs[0][0]["totals"]["loss"], rel=1e-3)


@pytest.mark.parametrize("parallel", [TP2, TP2 | SP])
def test_dropout_leaves_replicated_factors_alike(parallel, gloo_world):
    """With masks of their own, tensor-parallel ranks would part in the factors that each of them has whole."""
    found = gloo_world(2).run(replicated_factors, *models("tied"), with_lora({"parallel": parallel}, lora_dropout=0.3))
    assert len(found[0]) == 16
    for name, tensor in found[0].items():
        assert torch.equal(found[1][name], tensor), name


def replicated_factors(rank, world_size, student, teacher, changes):
    from megatron_gkd.runtime.mesh import destroy_mesh

    _, student, teacher, batches = build_with_random_b(student, teacher, changes)
    for microbatches in batches:
        with teacher.resident():
            signals = teacher.score(microbatches)
        student.compute_gradients(microbatches, signals)
        student.update()
    factors = student.model.adapters.factors
    found = {factor.name: factor.parameter.clone() for factor in factors if factor.sharded_dim is None}
    destroy_mesh()
    return found


def answering_model(rank, world_size, model, folder, changes):
    """The merged weights of a model, whose adapters are exported, and those of what `generate` makes of the export."""
    from types import SimpleNamespace

    from training_layouts import recipe_of

    from megatron_gkd.models.adapter_export import export_adapters
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.generation_engine import build_generation_engine

    plain = {"teacher": {"teacher_kind": "none"}, "student": {"model": str(model)}}
    mesh, student, _, _ = build_with_random_b(model, None, changes | plain)
    export_adapters(student.model, folder)
    expected = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    recipe = recipe_of(changes | plain | {"lora": changes["lora"] | {"adapters": str(folder)}})
    models = SimpleNamespace(student=Checkpoint.open(str(model)), teachers={}, images=None)
    engine = build_generation_engine("student", recipe, mesh, models)
    found = {name: tensor.clone() for name, tensor in engine.model.named_tensors()}
    destroy_mesh()
    return expected, found


def test_generate_uses_the_adapters_that_the_recipe_starts_with(gloo_world, tmp_path):
    path = models("tied")[0]
    for expected, found in gloo_world(2).run(answering_model, path, tmp_path / "a", with_lora({"parallel": TP2})):
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())

"""Trains a multimodal student for three steps under a layout and returns everything that must not depend on it."""

from __future__ import annotations

import pytest
import torch
from training_layouts import TOLERANCE, recipe_of
from vision.vision_rows import SPECS, Spec, collate_rows, image_rows, padded_length

ROWS_OF_STEP = 4
TRAINED = {"train": {"freeze_vit": False, "freeze_aligner": False}}


def merged(*changes: dict) -> dict:
    """Return the changes of several recipes together."""
    result: dict = {}
    for one in changes:
        for section, keys in one.items():
            result[section] = {**result.get(section, {}), **keys}
    return result


def build_with_random_b(path, changes: dict):
    """Build a student with adapters whose factors B are not zero, else the factors A have no gradient."""
    import dataclasses

    from lora_runs import B_STD

    from megatron_gkd.models.lora.initialization import initialize_factors

    student, _, steps = build(path, None, changes)
    adapters, mesh = student.model.adapters, student.mesh
    randomized = dataclasses.replace(adapters.options, b_std=B_STD)
    initialize_factors(adapters.factors, randomized, mesh.tp.rank(), mesh.tp.size())
    student.optimizer.reload_model_params()
    return student, steps


def build(student, teacher, changes: dict, specs: list[Spec] = SPECS):
    """Return the student, the teacher (None without one) and the microbatches of each step, of this rank."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, initialize_mesh
    from megatron_gkd.training.build import build_student
    from megatron_gkd.training.build_teacher import build_teacher

    none = {} if teacher else {"teacher": {"teacher_kind": "none", "teacher_model": None}}
    recipe = recipe_of(merged(none, changes))
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    checkpoint = Checkpoint.open(str(student))
    teachers = {"teacher": Checkpoint.open(str(teacher))} if teacher else {}
    built = build_student(recipe, mesh, checkpoint, checkpoint.vocab_size, train_iters=3)
    steps = microbatches_of_steps(recipe, mesh, checkpoint.config, specs)
    return built, build_teacher(recipe, mesh, built, teachers), steps


def microbatches_of_steps(recipe, mesh, config, specs: list[Spec]):
    """Return this rank's microbatches of each step: of two rows each where rows are packed, otherwise of one."""
    rows = image_rows(config, specs)
    size = 2 if recipe.data.packing else 1
    steps = []
    for start in range(0, len(rows), ROWS_OF_STEP):
        own = rows[start : start + ROWS_OF_STEP][mesh.dp.rank() :: mesh.dp.size()]
        groups = [own[index : index + size] for index in range(0, len(own), size)]
        longest = max(padded_length(group, mesh) for group in groups) if mesh.layout.virtual_pipeline else None
        steps.append([collate_rows(group, mesh, longest)[0] for group in groups])
    return steps


def train_steps(rank, world_size, student, teacher, changes, specs=SPECS, left_out=None):
    """Return for each step: totals, gradient norm and whole gradient by name, and the whole weights at the end.

    The function at the path `left_out` does nothing while the models are built.
    """
    import contextlib
    from unittest import mock

    from megatron_gkd.runtime.mesh import destroy_mesh

    with contextlib.nullcontext() if left_out is None else mock.patch(left_out):
        model, scorer, steps = build(student, teacher, changes, specs)
    records = []
    for microbatches in steps:
        signals = [None] * len(microbatches)
        if scorer is not None:
            with scorer.resident():
                signals = scorer.score(microbatches)
        totals = model.compute_gradients(microbatches, signals, force_all_reduce=True)
        gradient = named_gradients(model)
        record = {"totals": totals, "gradient": gradient if rank == 0 else None}
        records.append(record | {"grad_norm": model.update(), "learning_rate": model.learning_rate})
    model.gather_parameters()
    weights = {name: tensor.clone() for name, tensor in model.model.named_tensors()}
    destroy_mesh()
    return records, weights if rank == 0 else None


@torch.no_grad()
def named_gradients(student) -> dict[str, torch.Tensor]:
    """Return the whole gradient of every parameter by its Hugging Face name; of frozen ones it is zero.

    The export maps parameters linearly, so it names and gathers gradients as well: put them in the parameters' place.
    """
    parameters = [parameter for chunk in student.model.chunks for parameter in chunk.parameters()]
    weights = [parameter.data for parameter in parameters]
    for parameter in parameters:
        gradient = parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)
        parameter.data = gradient.to(parameter.dtype)
    named = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return named


def assert_equal_runs(found, expected, tolerance: float = TOLERANCE) -> None:
    """Assert that two results of `train_steps` are equal up to rounding."""
    for step, (a, b) in enumerate(zip(found[0], expected[0], strict=True)):
        for name, value in b["totals"].items():
            assert a["totals"][name] == pytest.approx(value, rel=tolerance), f"step {step}: {name}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance), f"step {step}: gradient norm"
        assert a["gradient"].keys() == b["gradient"].keys()
        for name, gradient in b["gradient"].items():
            error = (a["gradient"][name] - gradient).norm() / gradient.norm().clamp(min=1e-30)
            assert error <= tolerance, f"step {step}: gradient of {name} is off by {error:.1e}"
    for name, weight in expected[1].items():
        error = (found[1][name] - weight).norm() / weight.norm()
        assert error <= tolerance, f"final weight {name} is off by {error:.1e}"

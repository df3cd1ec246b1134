"""Trains for a few steps under a layout and returns everything that must not depend on it."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from rows import RandomRows

TOLERANCE = 1e-5
RECIPE = {
    "student": {"model": "student"},
    "teacher": {"teacher_model": "teacher"},
    "distill": {"beta": 0.5, "temperature": 0.9, "sft_alpha": 0.3, "loss_chunk_tokens": 5},
    "parallel": {},
    "data": {"dataset": ["unused.jsonl"], "max_length": 64},
    # A large epsilon: Adam's first step is otherwise the sign of the gradient, which turns rounding into a difference.
    "train": {"global_batch_size": 4, "train_iters": 3, "lr": 1e-2, "adam_eps": 1e-3, "dtype": "fp32"},
    "output": {"output_dir": "unused"},
}


def recipe_of(changes: dict[str, dict]):
    from megatron_gkd.config.schema import Recipe

    sections = {section: RECIPE[section] | changes.get(section, {}) for section in RECIPE}
    others = {name: changes[name] for name in changes.keys() - sections.keys()}
    return Recipe.model_validate(sections | others)


def build(student, teacher, changes: dict[str, dict], rows: RandomRows | None = None):
    """Return the mesh, the student, the teacher and the loader that a recipe with `changes` gives, over random rows.

    `teacher` may be several, by their places in the recipe; None where there is no model beside the student.
    """
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.loader import StepLoader
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, initialize_mesh
    from megatron_gkd.training.build import build_student
    from megatron_gkd.training.build_teacher import build_teacher, shared_vocab_size_of_all

    recipe = recipe_of(changes)
    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    checkpoint = Checkpoint.open(str(student))
    paths = teacher if isinstance(teacher, dict) else {"teacher": teacher} if teacher else {}
    teachers = {place: Checkpoint.open(str(path)) for place, path in paths.items()}
    vocab_size = shared_vocab_size_of_all(checkpoint, teachers)
    student = build_student(recipe, mesh, checkpoint, vocab_size, train_iters=3)
    rows = rows or RandomRows(count=24)
    order = SampleOrder(rows.sizes, [1.0], seed=recipe.train.seed, shuffle=True)
    teacher = build_teacher(recipe, mesh, student, teachers)
    config = BatchConfig.from_recipe(recipe, mesh, pad_token_id=0)
    return mesh, student, teacher, StepLoader(rows, order, config, range(1, 4))


def train_steps(rank, world_size, student, teacher, changes, break_gradient=False, rows=None, steps=3):
    """Return for each step: loss, other totals, gradient norm, and on rank 0 the gradient by Hugging Face name.

    `steps`: at most 3.
    """
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers.base import FollowsStudent

    _, student, teacher, batches = build(student, teacher, changes, rows)
    if break_gradient:
        _drop_sequence_parallel_reduction(student)
    records = []
    for microbatches in itertools.islice(batches, steps):
        signals = [None] * len(microbatches)
        if teacher is not None:
            with teacher.resident():
                signals = teacher.score(microbatches)
        totals = student.compute_gradients(microbatches, signals, force_all_reduce=True)
        gradient = named_gradients(student)
        record = {"totals": totals, "gradient": gradient if rank == 0 else None}
        records.append(record | {"grad_norm": student.update()})
        if isinstance(teacher, FollowsStudent):
            teacher.after_update()
    destroy_mesh()
    return records


def trainer_of(student, teacher, batches, directory, **options):
    """A trainer of three steps that writes into `directory`, and the list that gets its steps' records.

    `options` may be those of `TrainerConfig`, and `rollouts`, `exports`, `checkpoints`, `interruptions` and `reporter`.
    """
    from megatron_gkd.training.batches import TrainingData
    from megatron_gkd.training.exports import Exports
    from megatron_gkd.training.trainer import RunOutput, Trainer, TrainerConfig

    records = []
    data = TrainingData(batches, rollouts=options.pop("rollouts", None))
    reporter = options.pop("reporter", SimpleNamespace(step=records.append, plot=lambda: None))
    output = RunOutput(reporter, options.pop("exports", Exports(directory)), options.pop("checkpoints", None))
    interruptions = options.pop("interruptions", None)
    config = TrainerConfig(**{"train_iters": 3} | options)
    return Trainer(config, student, teacher, data, output, interruptions), records


def weights_of(student) -> dict[str, torch.Tensor]:
    """Return the student's whole weights, under their Hugging Face names."""
    student.gather_parameters()
    return {name: tensor.clone() for name, tensor in student.model.named_tensors()}


def named_gradients(student) -> dict[str, torch.Tensor]:
    """Return the whole gradient of every parameter by its Hugging Face name."""
    parameters = [p for chunk in student.model.chunks for p in chunk.parameters()]
    return export_gradients(parameters, student.model.named_tensors)


@torch.no_grad()
def export_gradients(parameters, named_tensors) -> dict[str, torch.Tensor]:
    """The export maps parameters linearly, so it names and gathers gradients as well: put them in the parameters'
    place.
    """
    weights = [p.data for p in parameters]
    for parameter in parameters:
        parameter.data = parameter.main_grad.to(parameter.dtype)
    named = {name: tensor.clone() for name, tensor in named_tensors()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    return named


def _drop_sequence_parallel_reduction(student) -> None:
    """Leave the norms' gradients, each made from a part of the tokens, unsummed over the ranks: the classic bug."""
    for chunk in student.model.chunks:
        for parameter in chunk.parameters():
            parameter.sequence_parallel = False


def with_beta(changes: dict, beta: float) -> dict:
    return changes | {"distill": {"beta": beta}}


def assert_equal_runs(found, expected, tolerance=TOLERANCE):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name, value in b["totals"].items():
            assert a["totals"][name] == pytest.approx(value, rel=tolerance), f"step {step}: {name}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance), f"step {step}: gradient norm"
        assert a["gradient"].keys() == b["gradient"].keys()
        for name, gradient in b["gradient"].items():
            error = (a["gradient"][name] - gradient).norm() / gradient.norm()
            assert error <= tolerance, f"step {step}: gradient of {name} is off by {error:.1e}"

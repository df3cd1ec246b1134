"""Training with adapters for a few steps under a layout, for what must not depend on it."""

from __future__ import annotations

import contextlib
import functools
from unittest import mock

import torch
from checkpoints import tiny_checkpoint
from training_layouts import build, export_gradients

LORA = {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0}
B_STD = 0.05


def with_lora(changes: dict[str, dict], **keys) -> dict[str, dict]:
    return changes | {"lora": LORA | changes.get("lora", {}) | keys}


@functools.cache
def models(kind: str):
    """Return a student and a teacher; `kind` is the student's."""
    teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)
    match kind:
        case "tied":  # four layers, for two virtual stages on each of two ranks
            return tiny_checkpoint("qwen3_tied", seed=2), teacher
        case "untied":
            return tiny_checkpoint("llama", seed=2), teacher
        case "mixture":
            return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2), teacher


def build_with_random_b(*arguments, **options):
    """Build with factors B that are not zero: else the factors A have no gradient."""
    import dataclasses

    from megatron_gkd.models.lora.initialization import initialize_factors

    mesh, student, teacher, batches = build(*arguments, **options)
    adapters = student.model.adapters
    randomized = dataclasses.replace(adapters.options, b_std=B_STD)
    initialize_factors(adapters.factors, randomized, mesh.tp.rank(), mesh.tp.size())
    student.optimizer.reload_model_params()
    return mesh, student, teacher, batches


def train_steps(rank, world_size, student, teacher, changes, break_model=None, left_out=None):
    """Return for each step: loss, other totals, gradient norm, and on rank 0 the factors' gradients by PEFT's names.

    `break_model` is called with the student; the function at the path `left_out` does nothing while it is built.
    """
    from megatron_gkd.runtime.mesh import destroy_mesh

    with contextlib.nullcontext() if left_out is None else mock.patch(left_out):
        _, student, teacher, batches = build_with_random_b(student, teacher, changes)
    if break_model is not None:
        break_model(student)
    records = []
    for microbatches in batches:
        with teacher.resident():
            signals = teacher.score(microbatches)
        totals = student.compute_gradients(microbatches, signals, force_all_reduce=True)
        gradient = named_gradients(student)
        record = {"totals": totals, "gradient": gradient if rank == 0 else None}
        records.append(record | {"grad_norm": student.update()})
    destroy_mesh()
    return records


def named_gradients(student) -> dict[str, torch.Tensor]:
    """Return the factors' whole gradients by PEFT's names."""
    parameters = [factor.parameter for factor in student.model.adapters.factors]
    return export_gradients(parameters, student.model.adapter_tensors)


def leave_out_sequence_parallel_flags(student) -> None:
    """Leave the gradients of replicated factors, each made from a part of the tokens, unsummed over the ranks."""
    for factor in student.model.adapters.factors:
        factor.parameter.sequence_parallel = False

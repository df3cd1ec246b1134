"""Counts what one step of a real run on CPUs allocates and sends, to compare it with a plan of the same recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from rows import RandomRows

LENGTH = 128
RECIPE = {
    "distill": {"beta": 0.5, "loss_chunk_tokens": 64},
    "data": {"dataset": ["unused.jsonl"], "max_length": LENGTH},
    "train": {"global_batch_size": 8, "train_iters": 5, "lr": 1e-3, "dtype": "fp32", "moe_aux_loss_coeff": 0.0},
    "output": {"output_dir": "unused"},
    # A plan is for GPUs, where it would be on.
    "megatron": {"bias_swiglu_fusion": "off"},
}


def recipe_of(student, teacher, changes: dict[str, Any]):
    from megatron_gkd.config.schema import Recipe

    tree = {name: section | changes.get(name, {}) for name, section in RECIPE.items()}
    models = {"student": {"model": str(student)}, "teacher": {"teacher_model": str(teacher)}}
    others = {name: section for name, section in changes.items() if name not in tree}
    return Recipe.model_validate({"parallel": {}, **models, **tree, **others})


class FullRows(RandomRows):
    """Rows of `LENGTH` tokens, all but the last of which are trained on."""

    def __init__(self) -> None:
        super().__init__(count=64)
        generator = np.random.default_rng(0)
        self.rows = [generator.integers(4, 64, LENGTH).astype(np.int64) for _ in self.rows]
        self.lengths, self.prompt_lengths = np.full(64, LENGTH), np.zeros(64, dtype=np.int64)
        self.num_labels = self.lengths - 1


def metered_step(rank, world_size, student, teacher, changes):
    """Return what this rank holds, allocates and sends in a step of a run after the first, without what CPUs save.

    The least peaks of several steps count: gloo's thread may hold the input of a collective a moment after its end.
    """
    from megatron_gkd.ops import scratch
    from megatron_gkd.runtime.transformer_engine import causal_attention, norm

    from megatron.core.models.common.embeddings import rope_utils

    with pytest.MonkeyPatch.context() as patch:
        # torch's mask is a tensor of its own class, which can't be created under a mode; it becomes this one on a CPU.
        patch.setattr(causal_attention, "causal_lower_right", _lower_right_mask)
        # A plan is for GPUs.
        patch.setattr(norm, "has_fewer_passes", lambda *_: False)
        patch.setattr(rope_utils, "_apply_rotary_pos_emb_bshd", rope_utils._apply_rotary_pos_emb_bshd.__wrapped__)
        patch.setattr(scratch, "take", lambda like, *shape: like.new_empty(shape))
        return _metered_step(student, teacher, changes)


def _lower_right_mask(queries, keys):
    return torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)


def _metered_step(student, teacher, changes):
    from megatron_gkd.planning.transfers import by_link
    from megatron_gkd.runtime.mesh import destroy_mesh, links_of_groups
    from megatron_gkd.runtime.meter import Meter

    mesh, student, teacher, batches = _build(recipe_of(student, teacher, changes))
    links = links_of_groups(mesh)
    first, *others = list(batches)
    _step(student, teacher, first, Meter("cpu"))
    held = {
        "parameters": sum(p.numel() for p in _parameters(student)),
        "weights": _bytes(_parameters(student)),
        "gradients": _bytes(_gradients(student)),
        "optimizer": _bytes(_optimizer(student), beside=[*_parameters(student), *_gradients(student)]),
    }
    steps = []
    for batch in others:
        meter = Meter("cpu")
        meter.track(_parameters(student), _gradients(student), list(_optimizer(student)), [vars(one) for one in batch])
        meter.track([p for chunk in teacher.model.chunks for p in chunk.parameters()])
        steps.append(_step(student, teacher, batch, meter))
    destroy_mesh()
    peaks = {phase: min(found[phase] for found, _, _ in steps) for phase in steps[0][0]}
    _, states, sent = steps[0]
    assert all(one[2] == sent for one in steps)
    return held | {"peaks": peaks, "states": states, "sent": {phase: by_link(sent[phase], links) for phase in sent}}


def _build(recipe):
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.loader import StepLoader
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.runtime.mesh import Layout, initialize_mesh
    from megatron_gkd.training.build import build_student
    from megatron_gkd.training.build_teacher import build_teacher

    mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
    checkpoint, other = Checkpoint.open(recipe.student.model), Checkpoint.open(recipe.teacher.teacher_model)
    student = build_student(recipe, mesh, checkpoint, min(checkpoint.vocab_size, other.vocab_size), train_iters=5)
    teacher = build_teacher(recipe, mesh, student, {"teacher": other})
    rows = FullRows()
    order = SampleOrder(rows.sizes, [1.0], seed=0, shuffle=False)
    return mesh, student, teacher, StepLoader(rows, order, BatchConfig.from_recipe(recipe, mesh, 0), range(1, 6))


def _step(student, teacher, microbatches, meter):
    """Train for one step; return the peaks, the bytes of the teacher's states, and what was sent, by phase."""
    peaks, sent = {}, {}

    def run(phase, action):
        before = meter.live
        meter.reset_peak()
        meter.collectives.clear()
        with meter:
            result = action()
        peaks[phase], sent[phase] = meter.peak - before, dict(meter.collectives)
        return result

    signals = run("teacher", lambda: teacher.score(microbatches))
    states = sum(signal.states.shard.nbytes for signal in signals if signal is not None)
    meter.track([signal.states.shard for signal in signals if signal is not None])
    finalize = student.model.config.finalize_model_grads_func

    def finalize_later(*args, **options):  # gloo's reductions allocate copies, which are not NCCL's
        peaks["passes"] = meter.peak - before
        finalize(*args, **options)

    before, student.model.config.finalize_model_grads_func = meter.live, finalize_later
    run("student", lambda: student.compute_gradients(microbatches, signals))
    student.model.config.finalize_model_grads_func = finalize
    run("update", student.update)
    return peaks, states, sent


def _parameters(student):
    return [parameter.data for chunk in student.model.chunks for parameter in chunk.parameters()]


def _gradients(student):
    return [b.grad_data for chunk in student.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def _optimizer(student):
    for part in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter.data
                yield from (v for v in part.optimizer.state[parameter].values() if torch.is_tensor(v) and v.dim())


def _bytes(tensors, beside=()) -> int:
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    known = {tensor.untyped_storage()._cdata for tensor in beside}
    return sum(size for key, size in storages.items() if key not in known)

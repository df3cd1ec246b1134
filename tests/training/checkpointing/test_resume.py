"""A run that is saved and loaded into new objects goes on bit by bit; under another layout, to rounding."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import CP2, EP2, PP2, SP, TP2
from rows import RandomRows
from training_layouts import build, weights_of

PP4 = {"pipeline_model_parallel_size": 4}
VPP2 = {"virtual_pipeline_model_parallel_size": 2}
EMA = {"teacher": {"teacher_kind": "self", "teacher_model": None, "teacher_ema": 0.6}}
LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"parallel": TP2}),
    "PP2xVPP2": (2, {"parallel": PP2 | VPP2}),
    "PP2": (2, {"parallel": PP2}),
    "PP2, 3+1": (2, {"parallel": PP2 | {"decoder_first_pipeline_num_layers": 3}}),
    "PP4, a layout": (4, {"parallel": PP4 | {"pipeline_model_parallel_layout": "Et|t*2|t|L"}}),
    "EP2, experts one by one": (2, {"parallel": EP2, "megatron": {"moe_grouped_gemm": False}}),
    "DP2": (2, {}),
    "CP2": (2, {"parallel": CP2}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "EP2": (2, {"parallel": EP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "TP2xPP2": (4, {"parallel": TP2 | PP2}),
    "PP2xEP2": (4, {"parallel": PP2 | EP2}),
    "CP2xEP2": (2, {"parallel": CP2 | EP2}),
    "TP2, EMA": (2, {"parallel": TP2} | EMA),
    "PP2, EMA": (2, {"parallel": PP2} | EMA),
    "EP2, EMA": (2, {"parallel": EP2} | EMA),
    "PP2xEP2, EMA": (4, {"parallel": PP2 | EP2} | EMA),
}


def moments_of(student) -> list[torch.Tensor]:
    from megatron_gkd.training.checkpointing.workarounds import adam_states

    states = [state for _, state in adam_states(student.optimizer)]
    return [state[name].detach().float() for state in states for name in sorted(state)]


def build_run(model, changes):
    """Return the student, its teacher (None without EMA), what is saved of both, and the batches of three steps."""
    from megatron_gkd.training.build_teacher import averages_of
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    apply_workarounds()
    plain = {"teacher": {"teacher_kind": "none", "teacher_model": None}}
    _, student, teacher, batches = build(model, None, plain | changes, RandomRows(count=24, privileged=True))
    return student, teacher, Saved(student, averages_of(teacher)), batches


def train_step(student, teacher, microbatches):
    signals = [None] * len(microbatches)
    if teacher is not None:
        with teacher.resident():
            signals = teacher.score(microbatches)
    totals = student.compute_gradients(microbatches, signals)
    record = totals["loss"], student.update(), student.learning_rate
    if teacher is not None:
        teacher.after_update()
    return record


def state_of(student, records):
    """Return the records, weights and moments, and take the run down."""
    from megatron_gkd.runtime.mesh import destroy_mesh

    found = records, weights_of(student), moments_of(student)
    destroy_mesh()
    return found


def train_and_save(rank, world_size, model, changes, directory):
    """Train three steps, and save the run after the first. Returns what the last two gave."""
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.saver import Saver

    student, teacher, saved, batches = build_run(model, changes)
    saver, records = Saver(CheckpointFolder(directory)), []
    for step, microbatches in enumerate(batches, start=1):
        records.append(train_step(student, teacher, microbatches))
        saver.poll()
        if step == 1:
            values = {"identity": {}, "progress": {"step": step, "updates": step}}
            saver.save(step, saved.to_write(), saved.description() | values)
    assert saver.finish()
    return state_of(student, records[1:])


def resume(rank, world_size, model, changes, directory):
    """Train the last two steps from the checkpoint of the first."""
    from megatron_gkd.training.checkpointing import loader
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder

    student, teacher, saved, batches = build_run(model, changes)
    with mock.patch.object(loader, "note_progress") as verified:
        path, problems = loader.newest_intact(CheckpointFolder(directory))
    assert problems == [] and (verified.called or rank > 0)
    with mock.patch.object(loader, "note_progress") as read:
        loader.load(saved, path, step=1)
    is_trained = any(one.requires_grad for chunk in student.chunks for one in chunk.parameters())
    assert read.called or not is_trained, "a checkpoint that takes long to load is no hang"
    records = [train_step(student, teacher, batch) for step, batch in enumerate(batches, start=1) if step > 1]
    return state_of(student, records)


def model_of(changes):
    if changes.get("parallel", {}).get("expert_model_parallel_size"):
        return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)
    return tiny_checkpoint("qwen3_tied", seed=2)


def with_dtype(dtype):
    return {"train": {"lr_decay_style": "linear", "weight_decay": 0.1, "dtype": dtype}}


CASES = [(layout, "fp32") for layout in LAYOUTS if layout != "PP4, a layout"] + [
    (layout, "bf16") for layout in ("one process", "PP2", "TP2+SPxEP2")
]


@pytest.fixture(scope="module")
def saved_run(gloo_world, tmp_path_factory):
    """`saved_run(layout, dtype)`: the folder of a run that was saved once, and what its later steps gave each rank."""
    runs = {}

    def of(layout, dtype):
        if (layout, dtype) not in runs:
            size, changes = LAYOUTS[layout]
            directory = tmp_path_factory.mktemp("checkpoints")
            arguments = model_of(changes), changes | with_dtype(dtype), directory
            runs[layout, dtype] = directory, gloo_world(size).run(train_and_save, *arguments)
        return runs[layout, dtype]

    return of


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_the_same_layout_resumes_bit_for_bit(layout, dtype, gloo_world, saved_run):
    size, changes = LAYOUTS[layout]
    directory, expected_of_ranks = saved_run(layout, dtype)
    changes = changes | with_dtype(dtype)
    found_of_ranks = gloo_world(size).run(resume, model_of(changes), changes, directory)
    for expected, found in zip(expected_of_ranks, found_of_ranks, strict=True):
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
        assert len(expected[2]) > 10 or not expected[2]
        assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


OTHERS = [
    ("TP2", "PP2"), ("PP2", "TP2+SP"), ("PP2xVPP2", "DP2"), ("DP2", "CP2"), ("CP2", "PP2xVPP2"),
    ("TP2xPP2", "one process"), ("one process", "TP2"), ("one process", "PP2"),
    ("EP2", "TP2+SPxEP2"), ("TP2+SPxEP2", "PP2xEP2"),
    ("PP2, 3+1", "PP4, a layout"), ("PP4, a layout", "PP2xVPP2"), ("PP2xVPP2", "PP2, 3+1"),
    ("EP2, experts one by one", "EP2"), ("EP2", "EP2, experts one by one"),
    ("CP2xEP2", "one process"), ("TP2, EMA", "PP2, EMA"), ("EP2, EMA", "PP2xEP2, EMA"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "other"), OTHERS)
def test_another_layout_resumes_up_to_rounding(layout, other, gloo_world, saved_run):
    directory, (expected, *_) = saved_run(layout, "fp32")
    size, changes = LAYOUTS[other]
    model = model_of(LAYOUTS[layout][1])
    found, *_ = gloo_world(size).run(resume, model, changes | with_dtype("fp32"), directory)
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= 1e-6 * tensor.norm(), name

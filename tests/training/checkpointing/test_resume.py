"""A run that is saved and loaded into new objects goes on bit by bit; under another layout, to rounding."""

from __future__ import annotations

import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import CP2, EP2, PP2, SP, TP2
from training_layouts import build, weights_of

VPP2 = {"virtual_pipeline_model_parallel_size": 2}
LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"parallel": TP2}),
    "PP2xVPP2": (2, {"parallel": PP2 | VPP2}),
    "PP2": (2, {"parallel": PP2}),
    "DP2": (2, {}),
    "CP2": (2, {"parallel": CP2}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "EP2": (2, {"parallel": EP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "TP2xPP2": (4, {"parallel": TP2 | PP2}),
}


def moments_of(student) -> list[torch.Tensor]:
    from megatron_gkd.training.checkpointing.workarounds import adam_states

    return [state[name].clone() for _, state in adam_states(student.optimizer) for name in sorted(state)]


def run_steps(student, batches, first):
    records = []
    for step, microbatches in enumerate(batches, start=1):
        if step >= first:
            totals = student.compute_gradients(microbatches, [None] * len(microbatches))
            records.append((totals["loss"], student.update(), student.learning_rate))
    return records


def save_and_resume(rank, world_size, model, changes, other, directory):
    """Three steps, saved after the first; then two more from the checkpoint, under `other`'s layout if it is given."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import load, newest_intact
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    plain = {"teacher": {"kind": "none", "teacher_model": None}}
    apply_workarounds()
    _, student, _, batches = build(model, None, changes | plain)
    saver = Saver(CheckpointFolder(directory))
    records = []
    for step, microbatches in enumerate(batches, start=1):
        totals = student.compute_gradients(microbatches, [None] * len(microbatches))
        records.append((totals["loss"], student.update(), student.learning_rate))
        saver.poll()
        if step == 1:
            values = {"identity": {}, "progress": {"step": step, "updates": step}}
            saver.save(step, Saved(student).to_write(), Saved(student).description() | values)
    assert saver.finish()
    expected = records[1:], weights_of(student), moments_of(student)
    destroy_mesh()

    _, student, _, batches = build(model, None, (other or changes) | plain)
    path, problems = newest_intact(CheckpointFolder(directory))
    assert problems == []
    load(Saved(student), path, step=1)
    found = run_steps(student, batches, 2), weights_of(student), moments_of(student)
    destroy_mesh()
    return expected, found


def model_of(changes):
    if changes.get("parallel", {}).get("expert_model_parallel_size"):
        return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)
    return tiny_checkpoint("qwen3_tied", seed=2)


CASES = [(layout, "fp32") for layout in LAYOUTS] + [(layout, "bf16") for layout in ("one process", "PP2", "TP2+SPxEP2")]


@pytest.mark.parametrize(("layout", "dtype"), CASES)
def test_the_same_layout_goes_on_bit_by_bit(layout, dtype, gloo_world, tmp_path):
    size, changes = LAYOUTS[layout]
    changes = changes | {"train": {"dtype": dtype, "lr_decay_style": "linear", "weight_decay": 0.1}}
    for expected, found in gloo_world(size).run(save_and_resume, model_of(changes), changes, None, tmp_path):
        assert found[0] == expected[0]
        assert all(torch.equal(found[1][name], tensor) for name, tensor in expected[1].items())
        assert len(expected[2]) > 10 or not expected[2]
        assert all(torch.equal(a, b) for a, b in zip(found[2], expected[2], strict=True))


OTHERS = [
    ("TP2", "PP2"), ("PP2", "TP2+SP"), ("PP2xVPP2", "DP2"), ("DP2", "CP2"), ("CP2", "PP2xVPP2"), ("EP2", "TP2+SPxEP2"),
    ("TP2+SPxEP2", "EP2"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "other"), OTHERS)
def test_another_layout_goes_on_to_rounding(layout, other, gloo_world, tmp_path):
    train = {"train": {"dtype": "fp32"}}
    (size, changes), (_, then) = LAYOUTS[layout], LAYOUTS[other]
    results = gloo_world(size).run(save_and_resume, model_of(changes), changes | train, then | train, tmp_path)
    expected, found = results[0]
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= 1e-6 * tensor.norm(), name

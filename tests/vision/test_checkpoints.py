"""Saved and resumed runs of multimodal students, their exports, and offloaded multimodal teachers."""

from __future__ import annotations

import pytest
import torch
from layouts import PP2
from vision.vision_runs import TRAINED, build, merged, train_steps
from vision_checkpoints import tiny_vision_checkpoint

RATES = {"train": {"vit_lr": 3e-2, "aligner_lr": 1e-3, "lr_decay_style": "linear", "weight_decay": 0.1}}
LANGUAGE_FROZEN = {"train": {"freeze_llm": True, "vit_lr": 3e-2}}
CASES = {
    "one process, rates": (1, merged(TRAINED, RATES)),
    "PP2, rates, tower frozen": (
        2,
        merged(RATES, {"train": {"vit_lr": None, "freeze_aligner": False}, "parallel": PP2}),
    ),
    "PP2, last stage frozen": (2, merged(TRAINED, LANGUAGE_FROZEN, {"parallel": PP2})),
    "DP2, rates": (2, merged(TRAINED, RATES)),
    "DP2, not distributed": (2, merged(TRAINED, RATES, {"parallel": {"distributed_optimizer": False}})),
}


def train(rank, world_size, path, changes, directory, resumes, without=None):
    """Train three steps, saved after the first; or the last two of them from that checkpoint.

    Returns losses, gradient norms, learning rates and weights after the first step's.

    Args:
        rank: of this process.
        world_size: number of processes.
        path: the student.
        changes: of the recipe.
        directory: of the checkpoint.
        resumes: whether to begin with the checkpoint.
        without: a key of the groups' overrides that is left out.
    """
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training import optimizer
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import load, newest_intact
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    apply_workarounds()
    original = optimizer._group_with_rate
    if without is not None:
        optimizer._group_with_rate = lambda *arguments: {
            key: {name: value for name, value in override.items() if name != without}
            for key, override in original(*arguments).items()
        }
    try:
        student, _, steps = build(path, None, changes)
    finally:
        optimizer._group_with_rate = original
    saved = Saved(student)
    if resumes:
        found, problems = newest_intact(CheckpointFolder(directory))
        assert problems == []
        load(saved, found, step=1)
    saver = Saver(CheckpointFolder(directory))
    records = []
    for step, microbatches in enumerate(steps, start=1):
        if resumes and step == 1:
            continue
        totals = student.compute_gradients(microbatches, [None] * len(microbatches))
        record = totals["loss"], student.update(), student.learning_rate
        if step > 1:
            records.append(record)
        elif not resumes:
            values = {"identity": {}, "progress": {"step": step, "updates": step}}
            saver.save(step, saved.to_write(), saved.description() | values)
            assert saver.finish()
    student.gather_parameters()
    weights = {name: tensor.clone() for name, tensor in student.model.named_tensors()}
    destroy_mesh()
    return records, weights


@pytest.mark.parametrize("case", CASES)
def test_resumes_bit_for_bit(case, gloo_world, tmp_path):
    size, changes = CASES[case]
    path = tiny_vision_checkpoint("qwen3_vl_tied", seed=2)
    expected = gloo_world(size).run(train, path, changes, tmp_path, resumes=False)
    found = gloo_world(size).run(train, path, changes, tmp_path, resumes=True)
    for one, other in zip(expected, found, strict=True):
        assert other[0] == one[0]
        assert all(torch.equal(other[1][name], weight) for name, weight in one[1].items())


def test_resumes_under_another_layout(gloo_world, tmp_path):
    path = tiny_vision_checkpoint("qwen3_vl_tied", seed=2)
    changes = merged(TRAINED, RATES)
    expected = gloo_world(2).run(train, path, merged(changes, {"parallel": PP2}), tmp_path, resumes=False)[0]
    found = gloo_world(1).run(train, path, changes, tmp_path, resumes=True)[0]
    for record, other in zip(found[0], expected[0], strict=True):
        assert record == pytest.approx(other)
    for name, weight in expected[1].items():
        assert (found[1][name] - weight).norm() <= 1e-5 * weight.norm(), name


def test_rates_would_be_lost_without_their_factor(gloo_world, tmp_path):
    """The test of the workaround: Megatron-Core recognizes groups by it, and would give the tower another's rates."""
    path = tiny_vision_checkpoint("qwen3_vl_tied", seed=2)
    changes = merged(TRAINED, RATES)
    expected = gloo_world(1).run(train, path, changes, tmp_path, resumes=False, without="lr_mult")[0]
    found = gloo_world(1).run(train, path, changes, tmp_path, resumes=True, without="lr_mult")[0]
    assert found[0][0] == expected[0][0]  # the first loss
    assert found[0][1] != expected[0][1]


def test_an_offloaded_teacher_gives_the_same_signals(gloo_world):
    """Correction biases of its experts are buffers, which are not offloaded."""
    student = tiny_vision_checkpoint("qwen2_5_vl", seed=2)
    teacher = tiny_vision_checkpoint("qwen3_vl_moe", seed=1)
    runs = [
        gloo_world(1).run(train_steps, student, teacher, {"teacher": {"offload_teacher_model": offload}})[0]
        for offload in (False, True)
    ]
    assert runs[0][0][-1]["totals"] == runs[1][0][-1]["totals"]
    assert all(torch.equal(runs[1][1][name], weight) for name, weight in runs[0][1].items())

"""A student that is in host memory between steps trains bit by bit as one that stays, and its device memory is free."""

from __future__ import annotations

import contextlib

import pytest
import torch
from checkpoints import tiny_checkpoint
from layouts import EP2, PP2, SP, TP2
from rows import RandomRows
from training_layouts import build, weights_of

VPP2 = {"virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
BF16 = {"train": {"dtype": "bf16"}}
LORA = {"lora": {"lora_rank": 4, "lora_alpha": 8}}
EMA = {"teacher": {"teacher_kind": "self", "teacher_model": None, "teacher_ema": 0.6}}
PRECISE = {"use_precision_aware_optimizer": True, "exp_avg_dtype": "fp8", "exp_avg_sq_dtype": "fp16"}
CASES = {
    "bf16": (1, BF16),
    "fp32": (1, {}),
    "DP2, bf16": (2, BF16),
    "DP2, overlapped": (2, BF16 | {"parallel": OVERLAP}),
    "DP2, not distributed": (2, BF16 | {"parallel": {"distributed_optimizer": False}}),
    "fp32, not distributed": (1, {"parallel": {"distributed_optimizer": False}}),
    "PP2xVPP2": (2, BF16 | {"parallel": PP2 | VPP2}),
    "TP2+SPxEP2": (2, BF16 | {"parallel": TP2 | SP | EP2}),
    "LoRA": (1, BF16 | LORA),
    "EMA": (1, BF16 | EMA),
    "precision-aware": (1, BF16 | {"memory": PRECISE}),
    "optimizer in host memory": (
        1,
        BF16 | {"memory": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}},
    ),
}


def model_of(changes):
    if changes.get("parallel", {}).get("expert_model_parallel_size"):
        return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2)
    return tiny_checkpoint("qwen3_tied", seed=2, num_hidden_layers=4)


def device_tensors(student) -> dict[str, list[torch.Tensor]]:
    """What a student holds, without the help of the code under test."""
    from megatron_gkd.training.optimizer_state import adams

    parameters = [parameter.data for chunk in student.model.chunks for parameter in chunk.parameters()]
    gradients = [p.main_grad for chunk in student.model.chunks for p in chunk.parameters() if hasattr(p, "main_grad")]
    state = []
    for adam in adams(student.optimizer):
        adam = getattr(adam, "gpu_optimizer", adam)
        for group in adam.param_groups if adam is not None else ():
            for parameter in group["params"]:
                state += [parameter, *(one for one in adam.state[parameter].values() if one.dim())]
    return {"model": parameters, "gradients": gradients, "optimizer": state}


def storage_bytes(*lists) -> int:
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for tensors in lists for one in tensors}
    return sum(storages.values())


def train(rank, world_size, model, changes, leaves):
    """Train three steps, away before each if `leaves` names what leaves. Return losses, weights and freed bytes."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers.base import FollowsStudent
    from megatron_gkd.training.student_offload import OffloadOptions, StudentOffload

    plain = {"teacher": {"teacher_kind": "none", "teacher_model": None}}
    _, student, teacher, batches = build(model, None, plain | changes, RandomRows(count=24, privileged=True))
    offload = StudentOffload(student, OffloadOptions("model" in leaves, "optimizer" in leaves))
    records, freed = [], []
    for microbatches in batches:
        tensors = device_tensors(student)
        before = storage_bytes(*tensors.values())
        with offload.away():
            if leaves:
                assert storage_bytes(tensors["gradients"]) == 0
                if leaves == {"model", "optimizer"}:
                    assert storage_bytes(*tensors.values()) == 0
                freed.append((offload.freed_bytes, before - storage_bytes(*tensors.values())))
        if leaves:
            assert all((one == 0).all() for one in tensors["gradients"])
        signals = [None] * len(microbatches)
        if teacher is not None:
            with teacher.resident():
                signals = teacher.score(microbatches)
        totals = student.compute_gradients(microbatches, signals)
        records.append((totals["loss"], student.update()))
        if isinstance(teacher, FollowsStudent):
            teacher.after_update()
    weights = weights_of(student)
    destroy_mesh()
    return records, weights, freed


BOTH = frozenset({"model", "optimizer"})


@pytest.mark.parametrize("case", CASES)
def test_an_absent_student_trains_as_one_that_stays(case, gloo_world):
    world_size, changes = CASES[case]
    found = gloo_world(world_size).run(train, model_of(changes), changes, BOTH)
    expected = gloo_world(world_size).run(train, model_of(changes), changes, frozenset())
    for (records, weights, freed), (same_records, same_weights, _) in zip(found, expected, strict=True):
        assert records == same_records
        assert all(torch.equal(weights[name], tensor) for name, tensor in same_weights.items())
        assert all(counted == seen > 0 for counted, seen in freed)


@pytest.mark.parametrize("leaves", ["model", "optimizer"])
def test_each_part_leaves_alone(leaves, gloo_world):
    found, expected = (gloo_world(1).run(train, model_of({}), BF16, frozenset(one))[0] for one in ([leaves], []))
    assert found[0] == expected[0]
    size = sum(weight.numel() for weight in expected[1].values())
    # bf16 weights or Adam's fp32 weights and moments, with the fp32 gradients; the moments exist from step 2 on.
    per_parameter = {"model": [6, 6, 6], "optimizer": [8, 16, 16]}[leaves]
    for (freed, seen), number in zip(found[2], per_parameter, strict=True):
        assert freed == seen and number * size <= freed <= number * size * 1.05


def fail_while_away(rank, world_size, model):
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.student_offload import OffloadOptions, StudentOffload

    _, student, _, _ = build(model, None, {"teacher": {"teacher_kind": "none", "teacher_model": None}})
    before = weights_of(student)
    with contextlib.suppress(RuntimeError), StudentOffload(student, OffloadOptions(True, True)).away():
        raise RuntimeError("the engine fails")
    after = weights_of(student)
    destroy_mesh()
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_is_back_after_an_engine_has_failed(gloo_world):
    assert gloo_world(1).run(fail_while_away, model_of({}))[0]


def save_and_leave(rank, world_size, model, directory):
    """Save, leave at once, and train on before the writing thread is done; return what a new run loads."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import load
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
    from megatron_gkd.training.student_offload import OffloadOptions, StudentOffload

    apply_workarounds()
    plain = BF16 | {"teacher": {"teacher_kind": "none", "teacher_model": None}}
    _, student, _, batches = build(model, None, plain)
    batches, saved = list(batches), Saved(student)
    student.compute_gradients(batches[0], [None] * len(batches[0]))
    student.update()
    expected = weights_of(student)
    saver = Saver(CheckpointFolder(directory))
    values = {"identity": {}, "progress": {"step": 1, "updates": 1}}
    saver.save(1, saved.to_write(), saved.description() | values)
    with StudentOffload(student, OffloadOptions(True, True)).away():
        assert saver.finish()
    destroy_mesh()
    _, student, _, _ = build(model, None, plain)
    load(Saved(student), CheckpointFolder(directory).final(1), step=1)
    found = weights_of(student)
    destroy_mesh()
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_is_written_while_the_student_is_away(gloo_world, tmp_path):
    assert gloo_world(1).run(save_and_leave, model_of({}), tmp_path)[0]

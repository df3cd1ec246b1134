"""States in host memory, and joined forward passes of the teacher: the same losses and gradients."""

from __future__ import annotations

import functools

import pytest
import torch
from allocations import Allocations
from checkpoints import tiny_checkpoint
from layouts import CP2, EP2, PP2, SP, TP2
from rows import RandomRows
from training.test_layouts import assert_equal_runs
from training_layouts import build, train_steps

HOST = {"teacher_states": "host"}
JOINED = {"teacher_micro_batch_tokens": 64}
SELF = {"teacher_kind": "self", "teacher_model": None}
ROWS = RandomRows(count=24, privileged=True)
MANY = {"train": {"global_batch_size": 8}}
CASES = {
    "one process": (1, {}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2": (2, {"parallel": PP2}),
    "CP2": (2, {"parallel": CP2}),
    "CP2xDP2, packed": (4, {"parallel": CP2, "data": {"packing": True}}),
    "EP2": (2, {"parallel": EP2}),
    "self": (1, {"teacher": SELF}),
    "self, PP2xVPP2": (2, {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2}, "teacher": SELF}),
}


def models(case):
    layers = {"num_hidden_layers": 4 if "VPP2" in case else 2}
    if case == "EP2":
        return tiny_checkpoint("qwen3_moe", seed=2, **layers), tiny_checkpoint("qwen3_moe", seed=3, **layers)
    teacher = None if case.startswith("self") else tiny_checkpoint("qwen3", seed=1, hidden_size=48, **layers)
    return tiny_checkpoint("qwen3_tied", seed=2, **layers), teacher


@pytest.fixture(scope="module")
def trained(gloo_world):
    @functools.cache
    def of(case, options):
        size, changes = CASES[case]
        teacher = {"teacher_model": "teacher"} | changes.get("teacher", {}) | dict(options)
        changes = MANY | changes | {"teacher": teacher}
        return gloo_world(size).run(train_steps, *models(case), changes, rows=ROWS)[0]

    return of


@pytest.mark.parametrize("case", CASES)
def test_states_in_host_memory_give_the_same_bits(case, trained):
    found, expected = trained(case, tuple(HOST.items())), trained(case, ())
    for a, b in zip(found, expected, strict=True):
        assert (a["totals"], a["grad_norm"]) == (b["totals"], b["grad_norm"])
        assert all(torch.equal(a["gradient"][name], one) for name, one in b["gradient"].items())


@pytest.mark.parametrize("case", [case for case in CASES if "VPP2" not in case])
def test_joined_microbatches_give_the_same(case, trained):
    assert_equal_runs(trained(case, tuple(JOINED.items())), trained(case, ()), tolerance=2e-6)


def count_passes(rank, world_size, models_, changes, tokens):
    """Return the lengths of the student's microbatches, and those of the teacher's forward passes, of one step."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers import label_states

    changes = MANY | changes | {"teacher": {"teacher_model": "teacher", "teacher_micro_batch_tokens": tokens}}
    _, _, teacher, batches = build(*models_, changes, ROWS)
    microbatches, lengths = next(iter(batches)), []
    original = label_states.hidden_states

    def counted(chunk, microbatch):
        lengths.append(microbatch.total_length)
        return original(chunk, microbatch)

    with pytest.MonkeyPatch.context() as patch, teacher.resident():
        patch.setattr(label_states, "hidden_states", counted)
        teacher.score(microbatches)
    read = [one.microbatch.total_length for one in teacher._inputs.build(microbatches, teacher.model.mesh)]
    destroy_mesh()
    return read, lengths


@pytest.mark.parametrize("case", ["one process", "EP2"])
def test_passes_are_as_full_as_they_may_be(case, gloo_world):
    """Replicas have the same number of passes, whatever the lengths of their rows: they share the experts."""
    size, changes = CASES[case]
    ranks = gloo_world(size).run(count_passes, models(case), changes, 60)
    longest = [max(lengths) for lengths in zip(*(read for read, _ in ranks), strict=True)]
    expected, total = [[]], 0
    for index, length in enumerate(longest):
        if total + length > 60 and expected[-1]:
            expected.append([])
            total = 0
        expected[-1].append(index)
        total += length
    assert 1 < len(expected) < len(longest)
    for read, lengths in ranks:
        assert lengths == [sum(read[index] for index in group) for group in expected]


def peak_of_states(rank, world_size, models_, options):
    """Return the bytes of all states, and the most that the device held while they were read one after the other."""
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.teachers.base import ReadOnce

    _, _, teacher, batches = build(*models_, MANY | {"teacher": {"teacher_model": "teacher"} | options}, ROWS)
    microbatches = next(iter(batches))
    with pytest.MonkeyPatch.context() as patch, Allocations(patch) as allocations, teacher.resident():
        signals = teacher.score(microbatches)
        largest = max(len(one.label_positions) for one in microbatches) * 48 * 4
        total = sum(signal.states.num_rows for signal in signals) * 48 * 4
        pinned = sum(allocations.pinned)
        once = ReadOnce(signals)
        del signals
        held, allocations.peak = allocations.live(), 0
        for index in range(len(once)):
            once[index].states.gather()
        peak = allocations.peak
    destroy_mesh()
    return largest, total, held, peak, pinned


def test_the_device_holds_two_microbatches_of_states(gloo_world):
    (largest, total, held, peak, pinned), (_, _, held_on_device, _, none) = (
        gloo_world(1).run(peak_of_states, models("one process"), options)[0] for options in (HOST, {})
    )
    assert total > 4 * largest
    assert held_on_device - held >= total
    assert largest <= peak - held <= 2 * largest
    assert pinned >= total > 0 == none

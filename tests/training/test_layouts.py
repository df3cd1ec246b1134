"""Loss and whole gradient under every layout equal those of one process, for three steps with updates in between."""

from __future__ import annotations

import functools

import pytest
from checkpoints import tiny_checkpoint
from training_layouts import train_steps

TOLERANCE = 1e-5
DIVERGENCES = [0.0, 0.5, 1.0]

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}

DENSE = {
    "TP2": (2, {"parallel": TP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2": (2, {"parallel": PP2}),
    "PP2xVPP2": (2, {"parallel": PP2 | {"virtual_pipeline_model_parallel_size": 2}}),
    "CP2": (2, {"parallel": CP2}),
    "DP2": (2, {}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, reduction overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "distributed_optimizer": False}}),
    "TP2xPP2": (4, {"parallel": TP2 | PP2}),
    "TP2xCP2": (4, {"parallel": TP2 | CP2}),
    "TP2+SPxCP2": (4, {"parallel": TP2 | SP | CP2}),
    "CP2xDP2, packed": (4, {"parallel": CP2, "data": {"packing": True}}),
    "TP2+SPxPP2xCP2": (8, {"parallel": TP2 | SP | PP2 | CP2}),
    "TP2xPP2xVPP2xDP2, packed": (
        8,
        {"parallel": TP2 | PP2 | {"virtual_pipeline_model_parallel_size": 2}, "data": {"packing": True}},
    ),
    "micro batch 2": (1, {"train": {"micro_batch_size": 2}}),
    "packed": (1, {"data": {"packing": True}}),
    "TP2+SP, packed": (2, {"parallel": TP2 | SP, "data": {"packing": True}}),
    "recompute": (1, {"parallel": RECOMPUTE}),
    "TP2+SPxCP2, recompute": (4, {"parallel": TP2 | SP | CP2 | RECOMPUTE}),
    "teacher offloaded": (1, {"teacher": {"offload_teacher_model": True}}),
    "TP2xPP2, teacher offloaded": (4, {"parallel": TP2 | PP2, "teacher": {"offload_teacher_model": True}}),
}
MOE = {
    "EP2": (2, {"parallel": EP2}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "TP2+SPxEP2xDP2": (4, {"parallel": TP2 | SP | EP2}),
    "PP2xEP2": (4, {"parallel": PP2 | EP2}),
    "CP2xEP2": (2, {"parallel": CP2 | EP2}),
}


@functools.cache
def models(kind: str):
    """A student and a teacher that differ in size, depth and family."""
    teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=6, hidden_size=48)
    if kind == "dense":
        return tiny_checkpoint("qwen3_tied", seed=2), tiny_checkpoint("qwen3_moe", seed=1)
    return tiny_checkpoint("qwen3_moe", seed=2), teacher


def with_beta(changes: dict, beta: float) -> dict:
    return changes | {"distill": {"beta": beta}}


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind: str, beta: float):
        return gloo_world(1).run(train_steps, *models(kind), with_beta({}, beta))[0]

    return of


def assert_equal_runs(found, expected, tolerance=TOLERANCE):
    for step, (a, b) in enumerate(zip(found, expected, strict=True)):
        for name, value in b["totals"].items():
            assert a["totals"][name] == pytest.approx(value, rel=tolerance), f"step {step}: {name}"
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance), f"step {step}: gradient norm"
        assert a["gradient"].keys() == b["gradient"].keys()
        for name, gradient in b["gradient"].items():
            error = (a["gradient"][name] - gradient).norm() / gradient.norm()
            assert error <= tolerance, f"step {step}: gradient of {name} is off by {error:.1e}"


@pytest.mark.parametrize("beta", DIVERGENCES)
@pytest.mark.parametrize("layout", DENSE)
def test_dense(layout, beta, gloo_world, one_process):
    world_size, changes = DENSE[layout]
    found = gloo_world(world_size).run(train_steps, *models("dense"), with_beta(changes, beta))[0]
    assert_equal_runs(found, one_process("dense", beta))


@pytest.mark.parametrize("beta", DIVERGENCES)
@pytest.mark.parametrize("layout", MOE)
def test_mixture_of_experts(layout, beta, gloo_world, one_process):
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(train_steps, *models("moe"), with_beta(changes, beta))[0]
    assert_equal_runs(found, one_process("moe", beta))


def test_a_reduction_that_is_left_out_is_noticed(gloo_world, one_process):
    """The test of the tests above."""
    _, changes = DENSE["TP2+SP"]
    found = gloo_world(2).run(train_steps, *models("dense"), with_beta(changes, 0.5), break_gradient=True)[0]
    assert found[0]["totals"]["loss"] == pytest.approx(one_process("dense", 0.5)[0]["totals"]["loss"], rel=TOLERANCE)
    with pytest.raises(AssertionError, match="gradient"):
        assert_equal_runs(found, one_process("dense", 0.5))

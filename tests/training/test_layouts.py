"""Loss and whole gradient under every layout equal those of one process, for three steps with updates in between."""

from __future__ import annotations

import functools

import pytest
from checkpoints import tiny_checkpoint
from layouts import DENSE, MOE
from training_layouts import train_steps

TOLERANCE = 1e-5
DIVERGENCES = [0.0, 0.5, 1.0]


@functools.cache
def models(kind: str):
    """A student and a teacher that differ in width, depth and head; `kind` is the student's, or its teacher's."""
    dense_teacher = tiny_checkpoint("qwen3", seed=1, num_hidden_layers=2, hidden_size=48)
    match kind:
        case "dense":  # four layers, for two virtual stages on each of two ranks
            return tiny_checkpoint("qwen3_tied", seed=2), dense_teacher
        case "mixture":
            return tiny_checkpoint("qwen3_moe", seed=2, num_hidden_layers=2), dense_teacher
        case "mixture teaches":
            return tiny_checkpoint("llama", seed=2, num_hidden_layers=2), tiny_checkpoint("qwen3_moe", seed=1)


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
    found = gloo_world(world_size).run(train_steps, *models("mixture"), with_beta(changes, beta))[0]
    assert_equal_runs(found, one_process("mixture", beta))


@pytest.mark.parametrize("layout", ["EP2", "TP2+SPxEP2xDP2"])
def test_a_mixture_of_experts_teaches_a_dense_model(layout, gloo_world, one_process):
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(train_steps, *models("mixture teaches"), with_beta(changes, 0.5))[0]
    assert_equal_runs(found, one_process("mixture teaches", 0.5))


def test_a_reduction_that_is_left_out_is_noticed(gloo_world, one_process):
    """The test of the tests above."""
    _, changes = DENSE["TP2+SP"]
    found = gloo_world(2).run(train_steps, *models("dense"), with_beta(changes, 0.5), break_gradient=True)[0]
    assert found[0]["totals"]["loss"] == pytest.approx(one_process("dense", 0.5)[0]["totals"]["loss"], rel=TOLERANCE)
    with pytest.raises(AssertionError, match="gradient"):
        assert_equal_runs(found, one_process("dense", 0.5))

"""Loss and whole gradient under every layout equal those of one process, in two steps with an update in between.

`test_golden` and the tests of rollouts and of the student as its own teacher make more steps.
"""

from __future__ import annotations

import functools

import pytest
from checkpoints import tiny_checkpoint
from layouts import DENSE, MOE
from training_layouts import TOLERANCE, assert_equal_runs, with_beta
from training_layouts import train_steps as train_three_steps

from megatron_gkd.ops.reference import FAMILIES

BETAS = [0.0, 0.5, 1.0]
# Beta is the loss's affair alone: its ends are tried where a rank has a part of the vocabulary, layers or tokens.
BOTH_ENDS = ["TP2", "TP2+SP", "PP2", "CP2", "TP2+SPxPP2xCP2", "TP2+SP, packed", "TP2+SPxEP2"]
# Every other divergence and both treatments of the teacher's top-k, under the layouts that differ to a loss.
OBJECTIVES = {name: {"divergence": name, "beta": 0.5} for name in FAMILIES if name != "jsd"} | {
    f"top-k, {tail}": {"beta": beta, "gkd_logits_topk": 7, "gkd_topk_tail": tail}
    for beta, tail in ((0.5, "renormalize"), (0.0, "bucket"))
}
OTHER_LAYOUTS = ["TP2+SP", "CP2", "TP2+SPxCP2"]


def train_steps(*arguments, **options):
    return train_three_steps(*arguments, steps=2, **options)


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


def objective(name: str) -> dict:
    return {"distill": OBJECTIVES[name]}


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind: str, beta: float):
        return gloo_world(1).run(train_steps, *models(kind), with_beta({}, beta))[0]

    return of


@pytest.fixture(scope="module")
def one_process_of_objective(gloo_world):
    @functools.cache
    def of(name: str):
        return gloo_world(1).run(train_steps, *models("dense"), objective(name))[0]

    return of


def with_betas(layouts):
    return [(layout, beta) for layout in layouts for beta in (BETAS if layout in BOTH_ENDS else [0.5])]


@pytest.mark.parametrize(("layout", "beta"), with_betas(DENSE))
def test_dense(layout, beta, gloo_world, one_process):
    world_size, changes = DENSE[layout]
    found = gloo_world(world_size).run(train_steps, *models("dense"), with_beta(changes, beta))[0]
    assert_equal_runs(found, one_process("dense", beta))


@pytest.mark.parametrize(("layout", "beta"), with_betas(MOE))
def test_mixture_of_experts(layout, beta, gloo_world, one_process):
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(train_steps, *models("mixture"), with_beta(changes, beta))[0]
    assert_equal_runs(found, one_process("mixture", beta))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_other_objectives(layout, name, gloo_world, one_process_of_objective):
    world_size, changes = DENSE[layout]
    found = gloo_world(world_size).run(train_steps, *models("dense"), changes | objective(name))[0]
    assert_equal_runs(found, one_process_of_objective(name))


@pytest.mark.parametrize("layout", ["EP2", "TP2+SPxEP2xDP2"])
def test_a_mixture_of_experts_teaches_a_dense_model(layout, gloo_world, one_process):
    world_size, changes = MOE[layout]
    found = gloo_world(world_size).run(train_steps, *models("mixture teaches"), with_beta(changes, 0.5))[0]
    assert_equal_runs(found, one_process("mixture teaches", 0.5))


def test_a_missing_reduction_is_detected(gloo_world, one_process):
    """The test of the tests above."""
    _, changes = DENSE["TP2+SP"]
    found = gloo_world(2).run(train_steps, *models("dense"), with_beta(changes, 0.5), break_gradient=True)[0]
    assert found[0]["totals"]["loss"] == pytest.approx(one_process("dense", 0.5)[0]["totals"]["loss"], rel=TOLERANCE)
    with pytest.raises(AssertionError, match="gradient"):
        assert_equal_runs(found, one_process("dense", 0.5))

"""A plan agrees with what real runs on CPUs hold, allocate and send."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
from checkpoints import tiny_checkpoint
from layouts import CP2, EP2, PP2, RECOMPUTE, SP, TP2
from planning.metered_runs import LENGTH, metered_step, recipe_of

from megatron_gkd.planning.costs import MeasureOptions, RankCosts

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=4, vocab_size=512)
BLOCK = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2}
TEACHER_HIDDEN_SIZE = 192
LAYOUTS = {
    "one process": ("dense", 1, {}),
    "DP2": ("dense", 2, {}),
    "TP2": ("dense", 2, TP2),
    "TP2+SP, recompute": ("dense", 2, TP2 | SP | RECOMPUTE),
    "PP2": ("dense", 2, PP2),
    "PP2xVPP2": ("dense", 2, PP2 | {"virtual_pipeline_model_parallel_size": 2}),
    "CP2": ("dense", 2, CP2),
    "recompute of two layers": ("dense", 1, BLOCK),
    "EP2": ("mixture", 2, EP2),
    "TP2+SPxEP2": ("mixture", 2, TP2 | SP | EP2),
    "mixture, recompute": ("mixture", 1, RECOMPUTE),
}
# The PyTorch fallback computes here; every token goes to all experts, so that their loads are equal.
OPTIONS = MeasureOptions(label_fraction=(LENGTH - 1) / LENGTH, expert_imbalance=1.0, transformer_engine=False)


@functools.cache
def models(kind):
    teacher = tiny_checkpoint("qwen3", seed=4, **SIZES | {"num_hidden_layers": 2, "hidden_size": TEACHER_HIDDEN_SIZE})
    if kind == "dense":
        return tiny_checkpoint("qwen3", seed=3, **SIZES, num_hidden_layers=4), teacher
    return tiny_checkpoint("qwen3_moe", seed=3, **SIZES, num_hidden_layers=2, num_experts_per_tok=4), teacher


@pytest.mark.parametrize("name", LAYOUTS)
def test_plan_equals_real_run(name, gloo_world, measured):
    kind, world_size, parallel = LAYOUTS[name]
    student, teacher = models(kind)
    changes = {"parallel": parallel}
    ranks = gloo_world(world_size).run(metered_step, student, teacher, changes)
    plan = measured(recipe_of(student, teacher, changes), world_size, OPTIONS)
    assert len(plan) == parallel.get("pipeline_model_parallel_size", 1)
    for costs in plan:
        assert_agrees(costs, ranks[costs.rank])


def assert_agrees(costs: RankCosts, run: dict) -> None:
    student, teacher = costs.student, costs.teachers["teacher"]
    for part in ("parameters", "weights", "gradients", "optimizer"):
        assert getattr(student, part) == run[part], part
    assert_peak(student.forward.peak, run["peaks"]["passes"], held_by_gloo(costs, SIZES["hidden_size"]), 0.05)
    # Ranks of a context-parallel group differ by one label in a microbatch.
    assert costs.teacher_states == pytest.approx(run["states"], rel=0.02)
    held = held_by_gloo(costs, TEACHER_HIDDEN_SIZE)
    assert_peak(teacher.forward.peak + costs.teacher_states, run["peaks"]["teacher"], held, 0.1)
    assert sent_of(costs) == {phase: sent for phase, sent in run["sent"].items() if sent}


def held_by_gloo(costs: RankCosts, hidden_size: int) -> int:
    """Return the bytes of a row's hidden states: gloo's thread may hold a collective's input a moment after its end."""
    return LENGTH * hidden_size * 4 if costs.traffic else 0


def assert_peak(planned: int, measured_peak: int, held: int, tolerance: float) -> None:
    assert (1 - tolerance) * (measured_peak - held) <= planned <= (1 + tolerance) * measured_peak


def sent_of(costs: RankCosts) -> dict:
    found: dict = {}
    for one in costs.traffic:
        kind = (one.link, one.group_size, one.operation, one.num_bytes)
        found.setdefault(one.phase, Counter())[kind] += one.count
    return found


def test_overlapped_gathers_are_counted_with_the_update(gloo_world, measured):
    student, teacher = models("dense")
    changes = {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}}
    run = gloo_world(2).run(metered_step, student, teacher, changes)[0]
    (costs,) = measured(recipe_of(student, teacher, changes), 2, OPTIONS)
    assert_peak(costs.student.forward.peak, run["peaks"]["passes"], held_by_gloo(costs, SIZES["hidden_size"]), 0.05)
    total = sum(sent_of(costs).values(), Counter())
    assert total == sum((Counter(sent) for sent in run["sent"].values()), Counter())

"""Every factor's gradient, the loss and the norm under every layout equal those of one process, for three steps."""

from __future__ import annotations

import functools

import pytest
from layouts import CP2, EP2, PP2, RECOMPUTE, SP, TP2
from lora_runs import leave_out_sequence_parallel_flags, models, train_steps, with_lora
from training_layouts import TOLERANCE, assert_equal_runs, with_beta

VPP2 = {"virtual_pipeline_model_parallel_size": 2}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
DENSE = {
    "TP2": (2, {"parallel": TP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "PP2": (2, {"parallel": PP2}),
    "PP2xVPP2": (2, {"parallel": PP2 | VPP2}),
    "CP2": (2, {"parallel": CP2}),
    "DP2": (2, {}),
    "DP2, optimizer not distributed": (2, {"parallel": {"distributed_optimizer": False}}),
    "DP2, reduction overlapped": (2, {"parallel": {"overlap_grad_reduce": True, "distributed_optimizer": False}}),
    "TP2xPP2": (4, {"parallel": TP2 | PP2}),
    "TP2+SPxCP2, recompute": (4, {"parallel": TP2 | SP | CP2 | RECOMPUTE}),
    "packed": (1, {"data": {"packing": True}}),
    "TP2+SP, packed": (2, {"parallel": TP2 | SP, "data": {"packing": True}}),
    "recompute": (1, {"parallel": RECOMPUTE}),
    "recompute, selective": (1, {"parallel": {"recompute_granularity": "selective"}}),
}
UNTIED = {name: DENSE[name] for name in ("TP2+SP", "PP2")}
MIXTURE = {
    "EP2": (2, {"parallel": EP2}),
    "TP2+SP": (2, {"parallel": TP2 | SP}),
    "TP2+SPxEP2": (2, {"parallel": TP2 | SP | EP2}),
    "CP2xEP2": (2, {"parallel": CP2 | EP2}),
    "PP2xEP2": (4, {"parallel": PP2 | EP2}),
}
FIRST_STAGE = {"target_regex": r"model\.layers\.[01]\..*"}
LAST_STAGE = {"target_regex": r"model\.layers\.[23]\..*"}
SELECTIONS = {  # kind of model, keys of lora, layout
    "first stage": ("tied", FIRST_STAGE, DENSE["PP2"]),
    "last stage": ("tied", LAST_STAGE, DENSE["PP2"]),
    "last stage, optimizer not distributed": (
        "tied",
        LAST_STAGE,
        (2, {"parallel": PP2 | {"distributed_optimizer": False}}),
    ),
    "first stage, recompute": ("tied", FIRST_STAGE, (2, {"parallel": PP2 | RECOMPUTE})),
    "attention of a mixture": ("mixture", {"target_modules": "linear_qkv"}, MIXTURE["TP2+SPxEP2"]),
    "experts": ("mixture", {"target_modules": "experts"}, MIXTURE["PP2xEP2"]),
    "ranks of their own": (
        "tied",
        {"rank_pattern": {r"layers\.2\.self_attn\..*": 2, "down_proj": 6}, "use_rslora": True},
        DENSE["TP2xPP2"],
    ),
}
OBJECTIVES = {
    "forward KL": {"beta": 0.0},
    "reverse KL": {"beta": 1.0},
    "top-k": {"beta": 0.5, "gkd_logits_topk": 7, "gkd_topk_tail": "bucket"},
}


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind: str, objective: str | None = None, selection: str | None = None):
        keys = {} if selection is None else SELECTIONS[selection][1]
        changes = with_beta({}, 0.5) if objective is None else {"distill": OBJECTIVES[objective]}
        return gloo_world(1).run(train_steps, *models(kind), with_lora(changes, **keys))[0]

    return of


def run(gloo_world, layout, kind, break_model=None, left_out=None, **keys):
    world_size, changes = layout
    changes = with_lora({"distill": {"beta": 0.5}} | changes, **keys)
    return gloo_world(world_size).run(train_steps, *models(kind), changes, break_model, left_out)[0]


@pytest.mark.parametrize("layout", DENSE)
def test_dense(layout, gloo_world, one_process):
    assert_equal_runs(run(gloo_world, DENSE[layout], "tied"), one_process("tied"))


def test_all_communication_overlapped(gloo_world, one_process):
    """A rank has its share of the gradients alone; the losses and norms of three steps depend on all of it."""
    found = run(gloo_world, (2, {"parallel": OVERLAP}), "tied")
    without_gradient = [[one | {"gradient": {}} for one in records] for records in (found, one_process("tied"))]
    assert_equal_runs(*without_gradient)


@pytest.mark.parametrize("layout", UNTIED)
def test_untied(layout, gloo_world, one_process):
    assert_equal_runs(run(gloo_world, UNTIED[layout], "untied"), one_process("untied"))


@pytest.mark.parametrize("layout", MIXTURE)
def test_mixture_of_experts(layout, gloo_world, one_process):
    assert_equal_runs(run(gloo_world, MIXTURE[layout], "mixture"), one_process("mixture"))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_some_layers_only(selection, gloo_world, one_process):
    kind, keys, layout = SELECTIONS[selection]
    assert_equal_runs(run(gloo_world, layout, kind, **keys), one_process(kind, selection=selection))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", ["TP2+SP", "CP2"])
def test_other_objectives(layout, objective, gloo_world, one_process):
    world_size, changes = DENSE[layout]
    found = run(gloo_world, (world_size, changes | {"distill": OBJECTIVES[objective]}), "tied")
    assert_equal_runs(found, one_process("tied", objective))


@pytest.mark.parametrize("lora_dtype", [None, "fp32"])
@pytest.mark.parametrize("layout", ["PP2", "TP2+SP"])
def test_bf16_stays_as_close_as_rounding_allows(layout, lora_dtype, gloo_world):
    """Pipeline stages change no order of additions; tensor-parallel ranks do."""
    runs = []
    for size, changes in ((1, {}), DENSE[layout]):
        changes = changes | {"train": {"dtype": "bf16"}}
        runs.append(run(gloo_world, (size, changes), "tied", lora_dtype=lora_dtype))
    tolerance = {"PP2": 1e-6, "TP2+SP": 0.06}[layout]
    assert_equal_runs(runs[1][:1], runs[0][:1], tolerance)


def test_a_missing_reduction_is_detected(gloo_world, one_process):
    """The test of the tests above."""
    found = run(gloo_world, DENSE["TP2+SP"], "tied", break_model=leave_out_sequence_parallel_flags)
    expected = one_process("tied")
    assert found[0]["totals"]["loss"] == pytest.approx(expected[0]["totals"]["loss"], rel=TOLERANCE)
    with pytest.raises(AssertionError, match="gradient"):
        assert_equal_runs(found, expected)


MARKS = {
    "TP2": ("tied", "megatron_gkd.models.megatron_model._mark_shards"),
    "TP2+SPxEP2": ("mixture", "megatron_gkd.models.lora.injection._mark_experts"),
}


@pytest.mark.parametrize("layout", MARKS)
def test_a_missing_shard_mark_changes_the_norm(layout, gloo_world, one_process):
    kind, mark = MARKS[layout]
    found, expected = run(gloo_world, (DENSE | MIXTURE)[layout], kind, left_out=mark), one_process(kind)
    assert found[0]["grad_norm"] != pytest.approx(expected[0]["grad_norm"], rel=1e-3)
    for name, gradient in expected[0]["gradient"].items():
        assert (found[0]["gradient"][name] - gradient).norm() <= TOLERANCE * gradient.norm()

"""Loss, whole gradient and weights of multimodal students under every layout equal those of one process."""

from __future__ import annotations

import functools

import pytest
from layouts import CP2, EP2, PP2, RECOMPUTE, SP, TP2
from training_layouts import TOLERANCE
from vision.vision_runs import TRAINED, assert_equal_runs, merged, train_steps
from vision_checkpoints import tiny_vision_checkpoint

VPP2 = {"virtual_pipeline_model_parallel_size": 2}
PACKED = {"data": {"packing": True}}
# layout: family, beta, processes, changes of the recipe
CASES = {
    "TP2": ("qwen2_5_vl", 0.5, 2, {"parallel": TP2}),
    "TP2+SP": ("qwen3_vl_tied", 0.0, 2, {"parallel": TP2 | SP}),
    "PP2": ("qwen3_vl_tied", 0.5, 2, {"parallel": PP2}),
    "PP2xVPP2": ("qwen2_5_vl", 1.0, 2, {"parallel": PP2 | VPP2}),
    "CP2": ("qwen3_vl_tied", 1.0, 2, {"parallel": CP2}),
    "CP2, plain positions": ("internvl", 0.0, 2, {"parallel": CP2}),
    "DP2, one rank without images": ("qwen2_5_vl", 0.0, 2, {}),
    "DP2, optimizer not distributed": ("internvl", 0.5, 2, {"parallel": {"distributed_optimizer": False}}),
    "packed": ("qwen3_vl_tied", 0.5, 1, PACKED),
    "TP2+SP, packed": ("internvl", 1.0, 2, {"parallel": TP2 | SP} | PACKED),
    "TP2+SPxCP2": ("qwen3_vl_tied", 0.0, 4, {"parallel": TP2 | SP | CP2}),
    "TP2+SPxCP2, packed": ("qwen2_5_vl", 1.0, 4, {"parallel": TP2 | SP | CP2} | PACKED),
    "recompute": ("qwen3_vl_tied", 0.5, 1, {"parallel": RECOMPUTE, "train": {"vit_gradient_checkpointing": True}}),
    "TP2+SPxEP2": ("qwen3_vl_moe", 0.5, 2, {"parallel": TP2 | SP | EP2}),
    "CP2xEP2": ("qwen3_vl_moe", 0.5, 2, {"parallel": CP2 | EP2}),
}


@functools.cache
def models(family: str):
    """Return a student and a teacher of the family."""
    untied = family.removesuffix("_tied")
    return tiny_vision_checkpoint(family, seed=2), tiny_vision_checkpoint(untied, seed=1, intermediate_size=80)


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(family: str, beta: float):
        return gloo_world(1).run(train_steps, *models(family), merged(TRAINED, {"distill": {"beta": beta}}))[0]

    return of


@pytest.mark.parametrize("layout", CASES)
def test_equals_one_process(layout, gloo_world, one_process):
    family, beta, size, changes = CASES[layout]
    found = gloo_world(size).run(train_steps, *models(family), merged(TRAINED, changes, {"distill": {"beta": beta}}))
    assert_equal_runs(found[0], one_process(family, beta))


def test_deepstack_needs_its_repair(gloo_world, one_process):
    """The test of the repair: each rank adds the features of its own tokens, so their gradients are partial."""
    broken = "megatron_gkd.models.repairs.sum_deepstack_gradients"
    family, beta, size, changes = CASES["TP2+SP"]
    changes = merged(TRAINED, changes, {"distill": {"beta": beta}})
    found = gloo_world(size).run(train_steps, *models(family), changes, left_out=broken)[0]
    expected = one_process(family, beta)
    assert found[0][0]["totals"]["loss"] == pytest.approx(expected[0][0]["totals"]["loss"], rel=TOLERANCE)
    for name, gradient in expected[0][0]["gradient"].items():
        is_wrong = (found[0][0]["gradient"][name] - gradient).norm() > 1e-2 * gradient.norm()
        has_no_deepstack = ".merger." in name or ".blocks.2." in name
        assert is_wrong == ("visual." in name and not has_no_deepstack), name

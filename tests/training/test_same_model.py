"""A student that is its own teacher has nothing to learn, whatever the layout."""

from __future__ import annotations

import pytest
from checkpoints import tiny_checkpoint
from layouts import CP2, DENSE, EP2, SP, TP2
from training_layouts import train_steps

DENSE_LAYOUTS = ["TP2+SP", "PP2", "PP2xVPP2", "CP2", "TP2+SPxPP2xCP2", "TP2xPP2xVPP2xDP2, packed", "teacher offloaded"]
MOE_LAYOUTS = {"EP2": (2, {"parallel": EP2}), "TP2+SPxCP2xEP2": (4, {"parallel": TP2 | SP | CP2 | EP2})}


# The ends of beta under 8 processes are in test_layouts.
CASES = [
    (layout, beta)
    for layout in (*DENSE_LAYOUTS, *MOE_LAYOUTS)
    for beta in ([0.5] if DENSE.get(layout, (0,))[0] == 8 else [0.0, 0.5, 1.0])
]


@pytest.mark.parametrize(("layout", "beta"), CASES)
def test_divergence_and_gradient_are_zero(layout, beta, gloo_world):
    family = "qwen3_moe" if layout in MOE_LAYOUTS else "qwen3_tied"
    world_size, changes = MOE_LAYOUTS.get(layout) or DENSE[layout]
    model = tiny_checkpoint(family, seed=2)
    train = changes.get("train", {}) | {"moe_aux_loss_coeff": 0.0}
    changes = changes | {"distill": {"beta": beta, "sft_alpha": 0.0}, "train": train}
    (first,) = gloo_world(world_size).run(train_steps, model, model, changes, steps=1)[0]
    assert abs(first["totals"]["divergence"]) / first["totals"]["tokens"] < 1e-7  # rounding
    assert first["totals"]["top1_agreement"] == first["totals"]["tokens"] > 0
    largest = max(gradient.abs().max().item() for gradient in first["gradient"].values())
    assert largest < 1e-7

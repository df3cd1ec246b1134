"""Rows with videos: transformers' logits and gradients, under one layout of two ranks, too, and in rollouts."""

from __future__ import annotations

import pytest
from families.case import errors_of
from families.vision import VisionCase, measure, reference

CASES = [VisionCase("qwen2_5_vl", ("PP2",), has_videos=True), VisionCase("qwen3_vl", ("TP2+SP",), has_videos=True)]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_logits_and_gradients_are_those_of_transformers(case, gloo_world):
    path, expected = reference(case)
    for layout in ("TP1", *case.layouts):
        world = gloo_world(1 if layout == "TP1" else 2)
        errors = errors_of(world.run(measure, path, expected, layout, None, case.rows))
        assert errors.logits <= case.tolerance, f"{layout}: logits off by {errors.logits:.1e}"
        assert errors.gradient <= 10 * case.tolerance, f"{layout}: {errors.worst} off by {errors.gradient:.1e}"

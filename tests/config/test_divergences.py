"""The recipe's divergences and bounds are those of the modules that use them, which it does not import."""

from typing import get_args

import pytest

from megatron_gkd.config.checks.distill import mixture_differs_from_both
from megatron_gkd.config.divergences import DivergenceName
from megatron_gkd.config.schema import DistillSection, Recipe, RolloutSection
from megatron_gkd.ops import reference, spec
from megatron_gkd.rollout import base as rollout

RECIPE = {
    "student": {"model": "student"},
    "teacher": {"teacher_model": "teacher"},
    "parallel": {},
    "data": {"dataset": ["rows.jsonl"]},
    "train": {"train_iters": 1},
    "output": {"output_dir": "out"},
}


def test_names():
    assert get_args(DivergenceName) == tuple(reference.FAMILIES)


def test_temperatures():
    bounds = {}
    for key, section in (("temperature", DistillSection), ("rollout_temperature", RolloutSection)):
        limits = section.model_fields[key].metadata
        bounds[key] = tuple(getattr(limit, name) for limit, name in zip(limits, ("ge", "le"), strict=True))
    assert bounds == {"temperature": spec.TEMPERATURES, "rollout_temperature": rollout.TEMPERATURES}


@pytest.mark.parametrize("divergence", reference.FAMILIES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_betas(divergence, beta):
    recipe = Recipe.model_validate(RECIPE | {"distill": {"divergence": divergence, "beta": beta}})
    try:
        reference.divergence_at(beta, divergence)
    except ValueError:
        assert len(list(mixture_differs_from_both.find(recipe, 1))) == 1
    else:
        assert list(mixture_differs_from_both.find(recipe, 1)) == []

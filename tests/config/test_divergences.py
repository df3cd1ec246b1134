"""The recipe's divergences are those that exist, and its check of beta is theirs: it does without importing torch."""

from typing import get_args

import pytest

from megatron_gkd.config.checks import _beta
from megatron_gkd.config.schema import DivergenceName, Recipe
from megatron_gkd.ops import reference

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


@pytest.mark.parametrize("divergence", reference.FAMILIES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_betas(divergence, beta):
    recipe = Recipe.model_validate(RECIPE | {"distill": {"divergence": divergence, "beta": beta}})
    try:
        reference.divergence_at(beta, divergence)
    except ValueError:
        assert len(list(_beta(recipe, 1))) == 1
    else:
        assert list(_beta(recipe, 1)) == []

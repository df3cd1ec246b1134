"""A step has as many collectives under each layout as docs/performance.md says, whatever the number of microbatches."""

from __future__ import annotations

import contextlib

import pytest
from benchmarks.collective_counts import CASES, MICROBATCHES, Models, combine, evaluate


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models.save(tmp_path_factory.mktemp("models"))


def count(rank, world_size, name, models, folder, gathers_twice=False):
    from benchmarks import collective_counts

    from megatron_gkd.training import optimizer

    repair = optimizer.parameters_gathered_once
    if gathers_twice:
        optimizer.parameters_gathered_once = contextlib.nullcontext
    try:
        return collective_counts.count(CASES[name], models, folder)
    finally:
        optimizer.parameters_gathered_once = repair


@pytest.mark.parametrize("name", CASES)
def test_the_formula_holds(name, models, gloo_world, tmp_path):
    ranks = gloo_world(2).run(count, name, models, tmp_path)
    for microbatches in MICROBATCHES:
        assert combine([rank[microbatches] for rank in ranks]) == CASES[name].expected(microbatches)


def test_megatron_gathers_the_parameters_of_a_mixture_twice(models, gloo_world, tmp_path):
    """The test fails once Megatron-Core does not, and `parameters_gathered_once` can go."""
    found = gloo_world(2).run(count, "EP2", models, tmp_path, gathers_twice=True)[0][2]
    expected = CASES["EP2"].expected(2)
    assert found == expected | {("dp_cp", "all_gather"): 2 * expected["dp_cp", "all_gather"]}


@pytest.mark.parametrize(
    ("formula", "value"), [("3", 3), ("m(4L + 2) + 1", 37), ("2mL", 16), ("m(2 + 2c)(L + 1)", 40), ("mL", 8)]
)
def test_formulas_are_written_as_products(formula, value):
    assert evaluate(formula, {"m": 2, "L": 4, "c": 1}) == value

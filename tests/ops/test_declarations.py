"""Every divergence is declared in each of the places that ``megatron_gkd/ops/__init__.py`` lists, under one name."""

from typing import get_args

import pytest
import torch
from csrc.emulated_kernels import DIVERGENCES as KERNEL_NAMES
from ops.oracle import random_logits

from megatron_gkd import ops
from megatron_gkd.config.divergences import FAMILIES, DivergenceName, Family
from megatron_gkd.ops import passes, pointwise, reference
from megatron_gkd.planning import loss_kernels

pytestmark = pytest.mark.cpu

NAMES = sorted(reference.DIVERGENCES)


def test_all_declarations_have_the_same_names():
    assert sorted(pointwise._TERMS) == NAMES
    assert sorted(KERNEL_NAMES) == NAMES
    named = {name for family in FAMILIES.values() for name in (family.between, family.at_0, family.at_1) if name}
    assert sorted(named) == NAMES
    assert get_args(DivergenceName) == tuple(FAMILIES)


def test_the_kernels_of_planning_are_complete():
    assert [name for name in passes._FUNCTIONS if not hasattr(loss_kernels._Kernels, name)] == []


@pytest.mark.skipif(passes.implementation() == "torch", reason="needs the compiled kernels")
@pytest.mark.parametrize("name", NAMES)
def test_the_kernels_know_every_name(name):
    from megatron_gkd import _C

    logits, rows = torch.zeros(2, 3), torch.zeros(2)
    out = torch.empty(2, 3)
    _C.gradient(out, logits, logits, torch.zeros(2, 4), rows, rows, None, None, None, name, 0.5, 1.0, None)
    assert not out.any()


def test_the_listed_files_exist():
    package = ops.__path__[0]
    text = [line.split()[0] for line in (ops.__doc__ or "").splitlines() if line.startswith("    ")]
    roots = {"config": f"{package}/..", "ops": f"{package}/..", "csrc": f"{package}/../..", "tests": f"{package}/../.."}
    assert len(text) == 5
    for name in text:
        with open(f"{roots[name.split('/')[0]]}/{name}") as file:
            assert "total_variation" in file.read().lower(), name


def test_a_new_divergence_needs_only_its_declarations(monkeypatch):
    """Half the squared distance of the probabilities, in plain torch; the kernels need a compiler."""
    brier = reference.Divergence(
        "brier",
        value=lambda a, b, beta: (a.exp() - b.exp()) ** 2 / 2,
        slope=lambda a, b, beta: (a.exp() - b.exp()) * a.exp(),
    )
    monkeypatch.setitem(FAMILIES, "brier", Family("brier", at_0="brier", at_1="brier"))
    monkeypatch.setitem(reference.DIVERGENCES, "brier", brier)
    monkeypatch.setitem(pointwise._TERMS, "brier", lambda a, b, p, q, beta: ((p - q) ** 2 / 2, (p - q) * p))
    monkeypatch.setattr(passes, "_kernels", None)
    student, teacher = (random_logits(3, 7, seed=seed, dtype=torch.float64) for seed in (0, 1))
    spec = ops.DivergenceSpec(beta=0.5, temperature=0.9, divergence="brier")
    assert torch.autograd.gradcheck(
        lambda s: ops.vocab_parallel_divergence(s, teacher, spec), (student.requires_grad_(),)
    )
    expected = reference.divergence(student, teacher, beta=0.5, divergence="brier", temperature=0.9)
    torch.testing.assert_close(ops.vocab_parallel_divergence(student, teacher, spec), expected)

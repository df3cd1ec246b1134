"""Gradients that are wrong under some layout without a repair: they equal those of one process, and differ without."""

from __future__ import annotations

import pytest
from families.text import CASES, build, write
from rows import RandomRows
from training_layouts import assert_equal_runs

TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
DENSE = {"mlp_only_layers": [0, 1, 2, 3]}
REPAIRS = {
    "delta net, TP2": ("sum_delta_net_norm_gradients", "qwen3_next", DENSE, TP2),
    "delta net, TP2+SP": ("sum_delta_net_norm_gradients", "qwen3_next", {}, TP2 | SP),
    "experts' biases, TP2+SPxEP2": ("mark_expert_biases", "gpt_oss", {}, TP2 | SP | {"expert_model_parallel_size": 2}),
}
"""Of each case: the repair, the family, what differs in its configuration, and the layout."""


def checkpoint(family: str, changes: dict):
    (case,) = (case for case in CASES if case.name == family)
    return write(case, build(case, **changes))


def one_step(rank, world_size, path, parallel, without):
    from training_layouts import build, named_gradients

    from megatron_gkd.models import repairs
    from megatron_gkd.runtime.mesh import destroy_mesh

    repair = getattr(repairs, without or "repair")
    try:
        if without is not None:
            setattr(repairs, without, lambda *args, **options: None)
        changes = {"teacher": {"teacher_kind": "none"}, "parallel": parallel, "train": {"moe_aux_loss_coeff": 0.0}}
        _, student, _, batches = build(path, None, changes, rows=RandomRows(count=4))
        microbatches = next(iter(batches))
        totals = student.compute_gradients(microbatches, [None] * len(microbatches), force_all_reduce=True)
        gradient = named_gradients(student)
        return [{"totals": totals, "gradient": gradient, "grad_norm": student.update()}]
    finally:
        setattr(repairs, without or "repair", repair)
        destroy_mesh()


@pytest.mark.parametrize("name", REPAIRS)
def test_a_gradient_is_that_of_one_process_with_its_repair_alone(name, gloo_world):
    repair, family, changes, parallel = REPAIRS[name]
    path = checkpoint(family, changes)
    expected = gloo_world(1).run(one_step, path, {}, None)[0]
    found = gloo_world(2).run(one_step, path, parallel, None)[0]
    assert_equal_runs(found, expected, tolerance=1e-4)
    unrepaired = gloo_world(2).run(one_step, path, parallel, repair)[0]
    with pytest.raises(AssertionError, match="gradient"):
        assert_equal_runs(unrepaired, expected, tolerance=1e-4)

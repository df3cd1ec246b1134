"""Weights of labels: the loss of a step is Σ weight · loss over the labels by their number, under every layout."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from layouts import DENSE, MOE
from rows import RandomRows
from training.test_layouts import models
from training.test_on_policy import train_on_policy
from training.test_one_process import STUDENT, assert_equals_oracle, oracle, teacher_of
from training_layouts import assert_equal_runs, train_steps

ROWS = functools.partial(RandomRows, count=24, weighted=True)
TOPK = {"distill": {"beta": 0.5, "gkd_logits_topk": 7, "gkd_topk_tail": "bucket"}}


@pytest.fixture(scope="module")
def one_process(gloo_world):
    @functools.cache
    def of(kind):
        return gloo_world(1).run(train_steps, *models(kind), {}, rows=ROWS())[0]

    return of


@pytest.mark.parametrize("privileged", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_equals_transformers(beta, privileged, gloo_world):
    rows = ROWS(privileged=privileged)
    changes = {"distill": {"beta": beta, "sft_alpha": 0.3}}
    record = gloo_world(1).run(train_steps, STUDENT(), teacher_of(), changes, rows=rows)[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), teacher_of(), beta, 0.9, 0.3, rows=rows))


def test_without_a_teacher(gloo_world):
    changes = {"teacher": {"teacher_kind": "none"}}
    record = gloo_world(1).run(train_steps, STUDENT(), None, changes, rows=ROWS())[0][0]
    assert_equals_oracle(record, *oracle(STUDENT(), None, None, None, None, rows=ROWS()))


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *(("dense", name) for name in ("TP2+SP", "PP2", "CP2", "micro batch 2", "packed", "TP2xPP2xVPP2xDP2, packed")),
        ("mixture", "TP2+SPxEP2"),
    ],
)
def test_every_layout_equals_one_process(kind, layout, gloo_world, one_process):
    world_size, changes = DENSE[layout] if kind == "dense" else MOE[layout]
    found = gloo_world(world_size).run(train_steps, *models(kind), changes, rows=ROWS())[0]
    assert_equal_runs(found, one_process(kind))


def test_a_mix_with_rows_of_the_student(gloo_world):
    """These have the weight 1, whatever the rows that they replace have."""
    expected = gloo_world(1).run(train_on_policy, *models("dense"), {}, 0.5, "row", rows=ROWS())[0]
    found = gloo_world(2).run(train_on_policy, *models("dense"), DENSE["CP2"][1], 0.5, "row", rows=ROWS())[0]
    assert_equal_runs(found, expected)
    assert any(0 < record["student_rows"] < 4 for record in expected)
    for record in expected:
        assert record["totals"]["tokens"] - record["totals"]["dataset_tokens"] == record["tokens"]


@pytest.mark.parametrize("changes", [{}, TOPK])
def test_a_weight_for_all_is_a_factor_of_the_loss_alone(changes, gloo_world):
    rows = RandomRows(count=24)
    plain = gloo_world(1).run(train_steps, *models("dense"), changes, rows=rows)[0][0]
    rows.label_weights = [np.full(length, 2, np.float32) for length in rows.lengths]
    double = gloo_world(1).run(train_steps, *models("dense"), changes, rows=rows)[0][0]
    assert double["totals"].pop("loss") == pytest.approx(2 * plain["totals"].pop("loss"), rel=1e-6)
    assert double["totals"] == plain["totals"]
    for name, gradient in plain["gradient"].items():
        torch.testing.assert_close(double["gradient"][name], 2 * gradient, rtol=1e-5, atol=1e-8)


def test_a_row_without_weights_has_the_weight_1_beside_others(gloo_world):
    rows = RandomRows(count=24)
    plain = gloo_world(1).run(train_steps, *models("dense"), {"data": {"packing": True}}, rows=rows)[0][0]
    rows.label_weights = [np.ones(length, np.float32) if n % 2 else None for n, length in enumerate(rows.lengths)]
    ones = gloo_world(1).run(train_steps, *models("dense"), {"data": {"packing": True}}, rows=rows)[0][0]
    assert ones["totals"] == plain["totals"]
    assert all(torch.equal(ones["gradient"][name], gradient) for name, gradient in plain["gradient"].items())

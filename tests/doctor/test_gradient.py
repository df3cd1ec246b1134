"""The self-test fails where the gradient or a rank is wrong; `test_command.py` shows that it passes here."""

from __future__ import annotations

import json

import pytest
import torch
from doctor.facts import BROKEN, found, subject

from megatron_gkd.doctor.gradient import NAME, compare, find_gradient
from megatron_gkd.doctor.gradient_rank import compute_errors
from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.ops import passes

FALSIFIED = """
import megatron_gkd.ops.passes as passes

gradient = passes.gradient

def falsified(out, *arguments):
    gradient(out, *arguments)
    out *= 1.001

passes.gradient = falsified
"""


def test_a_falsified_gradient_of_a_rank_is_found(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(FALSIFIED)
    monkeypatch.syspath_prepend(tmp_path)
    status, text, remedy = found(find_gradient, subject())[NAME]
    assert status == "failed" and "of its gradient 1.0e-03" in text and "rebuild" in remedy


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_a_falsified_sum_is_found(value, monkeypatch):
    sums = passes.sums
    monkeypatch.setattr(passes, "sums", lambda *arguments: sums(*arguments) * value)
    errors = compute_errors(0, 1, None, torch.device("cpu"))
    outcome = Outcome(0, json.dumps(vars(errors)), "")
    assert compare([outcome], "gloo").status == "failed"


def test_a_rank_that_fails_or_hangs():
    for outcome in (Outcome(1, "", "RuntimeError: no route"), Outcome(None, "", ""), Outcome(-11, "", "")):
        finding = compare([outcome, outcome], "nccl")
        assert finding.status == "failed" and outcome.problem in finding.text and finding.remedy


def test_it_is_left_out_where_torch_is_broken():
    assert found(find_gradient, subject(BROKEN)) == {}

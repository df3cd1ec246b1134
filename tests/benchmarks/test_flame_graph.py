"""The flame graph of a step, and its time by kind of work."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from benchmarks import flame
from benchmarks.environment import describe
from benchmarks.flame_graph import draw, tree
from benchmarks.steps.profile import KINDS, kind_of, totals

TIMES = {
    ("step",): 0.1,
    ("step", "gkd/student", "MLP"): 0.2,
    ("step", "gkd/student", "MLP", "aten::mm"): 0.4,
    ("step", "gkd/student", "_FusedLinear"): 0.1,
    ("step", "gkd/student", "aten::copy_"): 0.05,
    ("step", "gkd/optimizer", "aten::sqrt"): 0.15,
}


def test_time_by_kind():
    found = totals(TIMES)
    assert list(found) == list(KINDS)
    assert list(found.values()) == pytest.approx([0.4, 0.1, 0.15, 0.05, 0.3])
    run = {"environment": describe(torch.device("cpu")), "case": "a step"}
    text = flame.markdown(run | {"stacks": [[list(stack), value] for stack, value in TIMES.items()]}, top=1)
    assert "| products and attention | 400.0 | 40.0% |" in text
    assert "| student | 400.0 | 100.0 | 0.0 | 50.0 | 200.0 | 750.0 |" in text
    assert "| MLP | student | 200.0 |" in text and "aten::copy_" not in text, "the largest one is listed"


def test_the_picture_has_a_rectangle_for_each_path():
    assert tree(TIMES).total == pytest.approx(1.0)
    picture = draw(TIMES, "a < b", lambda stack: flame.COLORS[kind_of(stack)], flame.COLORS)
    titles = [one.text for one in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 8  # the six paths, and two that take no time by themselves
    assert "gkd/student: 750.0 ms, 75.0%" in titles and "aten::mm: 400.0 ms, 40.0%" in titles

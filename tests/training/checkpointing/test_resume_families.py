"""Parameters that few families have are saved and loaded: sinks, biases of experts, and those of delta nets."""

from __future__ import annotations

import pytest
from families.text import CASES, build, write
from layouts import EP2, PP2, SP, TP2
from training.checkpointing.test_resume import resume, train_and_save, with_dtype

TP2_EP2 = TP2 | SP | EP2
FAMILIES = {
    "gpt_oss": (TP2_EP2, PP2, 1e-6),
    "qwen3_next": (TP2 | SP, {}, 1e-4),  # its rule is in fp32 and less exact
    "glm4": (TP2, {}, 1e-6),
}
"""The layouts that save and resume, and how far their losses and weights may differ."""


@pytest.mark.parametrize("family", FAMILIES)
def test_another_layout_resumes_up_to_rounding(family, gloo_world, tmp_path):
    saving, resuming, tolerance = FAMILIES[family]
    (case,) = (case for case in CASES if case.name == family)
    model = write(case, build(case))
    changes = with_dtype("fp32")
    expected, *_ = gloo_world(2).run(train_and_save, model, changes | {"parallel": saving}, tmp_path)
    found, *_ = gloo_world(2 if resuming else 1).run(resume, model, changes | {"parallel": resuming}, tmp_path)
    for a, b in zip(found[0], expected[0], strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        assert (found[1][name] - tensor).norm() <= tolerance * tensor.norm(), name

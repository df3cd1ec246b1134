"""Every text family computes transformers' logits and gradients, and is exported bit by bit."""

from __future__ import annotations

import json

import pytest
from families.case import assert_close, compute_logits, errors_of, measure, read, rotated
from families.text import CASES, open_reference, reference
from logits import relative_error

from megatron_gkd.checkpoint_format.families import FAMILIES

pytestmark = pytest.mark.families


def test_every_text_family_has_a_case():
    text = {name for name, family in FAMILIES.items() if not family.has_images}
    assert text == {case.name.split(",")[0] for case in CASES}


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_logits_gradients_and_export_are_those_of_transformers(index, gloo_world, tmp_path):
    case = CASES[index]
    path, expected = reference(case)
    for layout in ("TP1", rotated(CASES, index)):
        world = gloo_world(1 if layout == "TP1" else 2)
        errors = errors_of(world.run(measure, path, expected, layout, tmp_path / "hf" if layout == "TP1" else None))
        assert_close(errors, case.tolerance, layout)
        assert errors.export == "", f"{layout}: {errors.export}"
        has_rollout = layout == "TP1" and case.name != "qwen3_next"  # whose delta nets have no embedded engine
        assert errors.rollout == ("same tokens" if has_rollout else ""), layout
    assert relative_error(compute_logits(open_reference(case, tmp_path / "hf")), expected.logits) <= 1e-6
    before, after = read(path), read(tmp_path / "hf")
    assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())


def test_minimax_s_own_key_for_a_part_of_each_head_is_read(gloo_world):
    (case,) = [case for case in CASES if case.name == "minimax_m2"]
    path, expected = reference(case)
    config = json.loads((path / "config.json").read_text())
    assert config["rotary_dim"] == 8 and config["rope_parameters"].pop("partial_rotary_factor") == 0.5
    (path / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": None}))
    errors = errors_of(gloo_world(1).run(measure, path, expected, "TP1"))
    assert errors.logits <= case.tolerance

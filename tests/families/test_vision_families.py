"""Every multimodal family computes transformers' logits and gradients, and is exported bit by bit."""

from __future__ import annotations

import pytest
from families.case import assert_close, errors_of, read, rotated
from families.vision import CASES, compute_logits, measure, open_reference, reference
from logits import relative_error

from megatron_gkd.checkpoint_format.families import FAMILIES

pytestmark = pytest.mark.families


def test_every_multimodal_family_has_a_case():
    named = {case.name.partition(",")[0].removesuffix("_tied").removesuffix("_qwen3") for case in CASES}
    assert named == {name for name, family in FAMILIES.items() if family.has_images}


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case.name for case in CASES])
def test_logits_gradients_and_export_are_those_of_transformers(index, gloo_world, tmp_path):
    case = CASES[index]
    path, expected = reference(case)
    for layout in ("TP1", rotated(CASES, index)):
        world = gloo_world(1 if layout == "TP1" else 2)
        errors = errors_of(world.run(measure, path, expected, layout, tmp_path / "hf" if layout == "TP1" else None))
        assert_close(errors, case.tolerance, layout)
        assert case.has_joined_experts or errors.export == "", f"{layout}: {errors.export}"
    assert relative_error(compute_logits(open_reference(tmp_path / "hf")), expected.logits) <= 1e-6
    if not case.has_joined_experts:
        before, after = read(path), read(tmp_path / "hf")
        assert before.keys() == after.keys() and all(tensor.equal(after[name]) for name, tensor in before.items())
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (path / name).read_bytes(), name

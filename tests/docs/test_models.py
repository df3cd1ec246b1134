"""The tables of models are those that were measured, for all families."""

from __future__ import annotations

import importlib
import json

import pytest
import write_model_table

from megatron_gkd.checkpoint_format.families import FAMILIES

RESULTS = json.loads(write_model_table.RESULTS.read_text(encoding="utf-8"))


def test_the_page_has_the_tables_of_the_results():
    page = write_model_table.PAGE.read_text(encoding="utf-8")
    assert page == write_model_table.render(page, RESULTS), "run scripts/write_model_table.py --render"


@pytest.mark.parametrize(("suite", "module"), write_model_table.SUITES.items())
def test_every_case_was_measured_under_all_of_its_layouts(suite, module):
    cases = importlib.import_module(module).CASES
    measured = {name: list(layouts) for name, layouts in RESULTS[suite].items()}
    assert measured == {case.name: ["TP1", *case.layouts] for case in cases}, "run scripts/write_model_table.py"


@pytest.mark.parametrize("suite", write_model_table.SUITES)
def test_no_model_is_off(suite):
    for name, layouts in RESULTS[suite].items():
        for layout, result in layouts.items():
            assert "error" not in result and result["export"] == "", f"{name}, {layout}"
            assert result["logits"] <= write_model_table.OK, f"{name}, {layout}"


def test_the_page_names_the_families_that_take_adapters():
    page = write_model_table.PAGE.read_text(encoding="utf-8").split("Adapters (LoRA)")[1].split("Others are")[0]
    words = page.replace(",", " ").replace(".", " ").split()
    assert {name for name, family in FAMILIES.items() if family.takes_lora} == FAMILIES.keys() & set(words)

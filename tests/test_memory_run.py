"""Launched runs with the keys about memory have the numbers of those without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from golden import runs

FOLDER = Path(__file__).parent / "golden"
HOST = {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5}
TEACHER = {"teacher_states": "host", "teacher_micro_batch_tokens": 256}


@pytest.mark.parametrize(
    ("name", "memory"), [("on_policy_megatron", HOST | {"offload_optimizer": True}), ("moe_ep2", HOST)]
)
def test_a_run_with_less_memory_has_the_numbers_of_its_golden_file(name, memory, tmp_path, monkeypatch):
    run = runs.RUNS[name]
    monkeypatch.setitem(runs.RUNS, name, replace(run, changes={**run.changes, "memory": memory, "teacher": TEACHER}))
    found = runs.numbers_of(name, tmp_path)
    for numbers, golden in zip(found, json.loads((FOLDER / f"{name}.json").read_text()), strict=True):
        assert numbers == pytest.approx(golden, rel=1e-4)

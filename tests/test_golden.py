"""The numbers of a few short runs are those that were committed: a refactoring changes none of them.

A change that is meant to change them writes them anew: `python tests/test_golden.py`, from the repository's root.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import pytest
from golden.runs import KEYS, RUNS, STEPS, numbers_of

FOLDER = Path(__file__).parent / "golden"


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_numbers_of_its_golden_file(name, tmp_path):
    expected = json.loads((FOLDER / f"{name}.json").read_text())
    found = numbers_of(name, tmp_path)
    assert len(found) == len(expected) == STEPS
    for step, (numbers, golden) in enumerate(zip(found, expected, strict=True), start=1):
        for key in KEYS:
            assert numbers[key] == pytest.approx(golden[key], rel=1e-6, abs=0), f"{key} of step {step}"


def main() -> None:
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            numbers = numbers_of(name, Path(folder))
        (FOLDER / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""Every bad input ends with its exit code and one clear line, soon, and leaves nothing half written."""

from __future__ import annotations

from pathlib import Path

import command_line
import pytest
from bad_inputs import checkpoints, command_lines, environments, recipes, rows, servers
from bad_inputs.case import Case, require_one_clear_line
from bad_inputs.workspace import write_workspace

TABLES = {
    module.__name__.rpartition(".")[2]: module.CASES
    for module in (recipes, command_lines, rows, checkpoints, environments, servers)
}
BEFORE_ANY_WORK = {"recipes", "command_lines", "environments"}
"""Tables whose cases mostly end before a process group or a plugin; the others import plugins, or need both."""
CASES = [pytest.param(case, id=f"{table}: {case.name}") for table, cases in TABLES.items() for case in cases]


def test_the_tables_are_large():
    assert len(CASES) >= 150
    for table, cases in TABLES.items():
        assert len({case.name for case in cases}) == len(cases) >= 10, table


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: Case, tmp_path: Path, capfd: pytest.CaptureFixture[str], request: pytest.FixtureRequest):
    write_workspace(tmp_path)
    table = request.node.callspec.id.partition(":")[0]
    require_one_clear_line(case, tmp_path, capfd if table in BEFORE_ANY_WORK else None)


def test_a_teacher_with_the_weights_of_the_student_is_remarked_on(tmp_path: Path):
    write_workspace(tmp_path)
    finished = command_line.run(tmp_path, "train", "recipe.yaml", "--teacher_model", "student")
    assert finished.returncode == 0
    assert "teacher: has the weights that the student starts with" in finished.stdout + finished.stderr
    finished = command_line.run(tmp_path, "train", "recipe.yaml", "--output_dir", "runs/y")
    assert finished.returncode == 0 and "the student starts with" not in finished.stdout + finished.stderr

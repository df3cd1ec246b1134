"""The README is short, its Python example runs, and figures and tables are those of their sources."""

from __future__ import annotations

import doctest
import subprocess
import sys

from docs.markdown import blocks
from world import REPOSITORY

README = REPOSITORY / "README.md"


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130


def test_the_python_example_runs():
    (block,) = blocks(README, "python")
    assert len(block.code.splitlines()) <= 12
    test = doctest.DocTestParser().get_doctest(block.code, {}, "README.md", str(README), 0)
    report: list[str] = []
    results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=report.append)
    assert results.attempted and not results.failed, "".join(report)


def test_tables_are_those_of_their_files():
    command = [sys.executable, REPOSITORY / "scripts/write_docs_tables.py", "--check"]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_figure_is_that_of_its_script():
    from draw_step_figure import FIGURE, draw

    assert FIGURE.read_text(encoding="utf-8") == draw()

"""Tables of the documents come from the newest result of a benchmark."""

from __future__ import annotations

import json

import pytest
import write_docs_tables

PAGE = "<!-- table: results/step_*.md | Whole | name, b -->\nold\n<!-- end of table -->\n"


def write(folder, name, date, value):
    (folder / f"{name}.json").write_text(json.dumps({"environment": {"date": date}}))
    table = f"# Whole steps\n\n| name | a | b |\n| --- | ---: | ---: |\n| x | 1 | {value} |\n"
    (folder / f"{name}.md").write_text(f"# Other\n\n| name |\n| --- |\n\n{table}")


def test_a_pattern_is_the_newest_file(tmp_path, monkeypatch):
    monkeypatch.setattr(write_docs_tables, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    assert "\nNot measured yet.\n" in write_docs_tables.update(PAGE)
    write(tmp_path / "results", "step_0.2.0", "2026-02-01", 2)
    write(tmp_path / "results", "step_0.1.0", "2026-01-01", 1)
    text = write_docs_tables.update(PAGE)
    assert "| x | 2 |\n" in text and "| name | b |\n" in text
    assert write_docs_tables.update(text) == text


def test_a_file_that_is_named_must_exist(tmp_path, monkeypatch):
    monkeypatch.setattr(write_docs_tables, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError):
        write_docs_tables.update(PAGE.replace("*", "0.1.0"))

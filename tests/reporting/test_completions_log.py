"""completions.jsonl, and the tables for people."""

import io
import json

from rich.console import Console

from megatron_gkd.reporting.completions_log import CompletionsLog, console_table, markdown_table

RECORD = {
    "step": 3,
    "row": 8,
    "version": 2,
    "prompt": "<|im_start|>user\nwhy [bold]?",
    "completion": "a|b\n* naïve",
    "prompt_length": 4,
    "completion_length": 2,
    "finish_reason": "stop",
    "divergence": 0.25,
    "token_ids": [5, 6],
    "token_divergence": [0.1, 0.4],
}


def test_a_line_for_each_completion_and_earlier_runs_are_kept(tmp_path):
    for run in range(2):
        log = CompletionsLog(tmp_path)
        log.write([{**RECORD, "step": run}, RECORD])
        assert [json.loads(line) for line in log.path.read_text().splitlines()] == [{**RECORD, "step": run}, RECORD]
        log.close()
    assert json.loads((tmp_path / "completions.jsonl.1").read_text().splitlines()[0])["step"] == 0


def test_the_console_shows_text_as_it_is():
    masked = {**RECORD, "divergence": None, "finish_reason": "length"}
    console = Console(file=io.StringIO(), width=120)
    console.print(console_table([RECORD, masked]))
    shown = console.file.getvalue()
    for part in ("step 3: completions", "why [bold]?", "<|im_start|>user", "0.2500", "length", "│ -"):
        assert part in shown, part


def test_markdown_keeps_its_cells():
    header, rule, row = markdown_table([RECORD]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 7
    assert "a&#124;b<br>&#42; naïve" in row and "&lt;&#124;im&#95;start" in row


def test_long_texts_are_shown_in_part():
    shown = markdown_table([{**RECORD, "prompt": "x" * 500 + "end", "completion": "start" + "y" * 500}])
    assert "xend" in shown and "starty" in shown and len(shown) < 1000

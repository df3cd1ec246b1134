"""The file completions.jsonl, and tables of a few completions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from megatron_gkd.reporting.metrics_log import open_records

_COLUMNS = ("prompt", "completion", "completion_length", "finish_reason", "version", "divergence")
_LONGEST = 400  # characters of a prompt's end and of a completion's start in a table


class CompletionsLog:
    """Append records to `output_dir/completions.jsonl`; an earlier run's file is kept, as in `MetricsLog`.

    Args:
        output_dir: folder of the file.
        last_step: the newest step of a run that is resumed; None for a new run.
    """

    def __init__(self, output_dir: str | Path, last_step: int | None = None) -> None:
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "completions.jsonl"
        self._file = open_records(self.path, last_step)

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append one line for each completion."""
        self._file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def console_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table for a terminal, of one or more completions of one step."""
    table = Table(title=f"step {records[0]['step']}: completions", show_lines=True)
    for name in _COLUMNS:
        table.add_column(name.replace("completion_length", "tokens").replace("_", " "), overflow="fold")
    for record in records:
        table.add_row(*(Text(cell) for cell in _cells(record)))  # as Text, in which brackets are no markup
    return table


def markdown_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Return a table for TensorBoard, of one or more completions."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    lines += [f"| {' | '.join(map(_as_markdown, _cells(record)))} |" for record in records]
    return "\n".join(lines)


def _cells(record: Mapping[str, Any]) -> list[str]:
    shown = {**record, "prompt": record["prompt"][-_LONGEST:], "completion": record["completion"][:_LONGEST]}
    if record["divergence"] is not None:
        shown["divergence"] = f"{record['divergence']:.4f}"
    return ["-" if shown[name] is None else str(shown[name]) for name in _COLUMNS]


def _as_markdown(cell: str) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;"), ("_", "&#95;")):
        cell = cell.replace(sign, entity)
    return cell.replace("\n", "<br>")

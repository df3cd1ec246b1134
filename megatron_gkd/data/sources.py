"""Data files as `datasets` tables of undecoded rows.

JSON rows stay text until a worker parses them: rows of one file may then differ in their keys and in the schemas of
their tools, which one Arrow schema could not hold, and a line that is not JSON is reported by its number.
"""

from __future__ import annotations

import glob
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.errors import UserError

TEXT = "text"  # the column that holds a JSON row


@dataclass(frozen=True)
class Source:
    """Rows of one file or folder.

    Attributes:
        path: as the recipe names it.
        table: the rows: one column of JSON text, or the columns of an Arrow table.
        unit: what `locate` counts, "line" or "row".
        is_json: whether rows are JSON text.
    """

    path: str
    table: datasets.Dataset
    unit: str
    is_json: bool

    def locate(self, index: int) -> str:
        """Return the place of row `index` (from 0) for messages, counted from 1: `train.jsonl, line 3`."""
        return f"{self.path}, {self.unit} {index + 1}"


def source_files(path: str) -> list[Path]:
    """Return all files that belong to a source, sorted.

    Raises:
        UserError: there is no file or folder at `path`.
    """
    root = Path(path)
    if not root.exists():
        raise UserError(f"{path}: no such file or folder")
    return [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())


def open_source(path: str, scratch: str) -> Source:
    """Open JSONL, JSON (a list of rows, or JSON lines), Parquet, or a folder that `datasets` saved.

    Args:
        path: the file or folder.
        scratch: folder for Arrow files, which must exist as long as the source is used.

    Raises:
        UserError: the path does not exist, is of another kind, or cannot be read.
    """
    kind = _kind(path)
    try:
        if kind == "folder":
            return Source(
                path, _without_decoding(datasets.load_from_disk(path).with_format(None)), "row", is_json=False
            )
        if kind == "parquet":
            return Source(path, _without_decoding(_load("parquet", path, scratch)), "row", is_json=False)
        if Path(path).stat().st_size == 0:
            return Source(path, datasets.Dataset.from_dict({TEXT: []}), "line", is_json=True)
        if kind == "json" and _starts_with_bracket(path):
            rows = [json.dumps(row) for row in json.loads(Path(path).read_text(encoding="utf-8-sig"))]
            return Source(path, datasets.Dataset.from_dict({TEXT: rows}), "row", is_json=True)
        # A byte that is not UTF-8 becomes \xNN, which JSON does not know: the row is reported as not JSON, by its line.
        lines = _load("text", path, scratch, encoding="utf-8-sig", encoding_errors="backslashreplace")
        return Source(path, lines, "line", is_json=True)
    except Exception as error:  # pyarrow and datasets raise many kinds of error for a damaged file
        reason = str(error.__cause__ or error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read: {reason}") from error


def decode_json(text: str) -> Any:
    """Parse a row's JSON text.

    Raises:
        BadRow: "not JSON".
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadRow("not JSON", f"{error.msg} at column {error.colno}") from error


def drop_nulls(value: Any) -> Any:
    """Return a row without the keys that its Arrow table has only because other rows have them."""
    if isinstance(value, dict):
        return {key: drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [drop_nulls(item) for item in value]
    return value


def _kind(path: str) -> str:
    root = Path(path)
    if not root.exists():
        raise UserError(f"{path}: no such file or folder")
    if root.is_dir():
        if (root / "dataset_dict.json").is_file():
            splits = ", ".join(json.loads((root / "dataset_dict.json").read_text())["splits"])
            raise UserError(f"{path}: holds several splits ({splits}); name the folder of one of them")
        if not (root / "state.json").is_file():
            raise UserError(f"{path}: not a folder that datasets.Dataset.save_to_disk wrote (it has no state.json)")
        return "folder"
    kind = root.suffix.lower().lstrip(".")
    if kind not in ("jsonl", "json", "parquet"):
        raise UserError(f"{path}: unknown kind of file; allowed are .jsonl, .json, .parquet and saved datasets folders")
    return kind


def _load(builder: str, path: str, scratch: str, **kwargs: Any) -> datasets.Dataset:
    return datasets.load_dataset(builder, data_files=[glob.escape(path)], split="train", cache_dir=scratch, **kwargs)


def _without_decoding(table: datasets.Dataset) -> datasets.Dataset:
    """Return a table whose columns of images, alone or in lists, hold encoded images rather than pixels."""
    encoded = datasets.Image(decode=False)
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, type(feature)(encoded))
    return table


def _starts_with_bracket(path: str) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith("[")
    return False

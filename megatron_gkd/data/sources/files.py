"""Tables of single data files."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
from datasets.arrow_writer import ArrowWriter
from datasets.exceptions import DatasetGenerationError

from megatron_gkd.config.dataset_names import ENDINGS, file_kind
from megatron_gkd.data.json_text import split_list
from megatron_gkd.data.sources.compression import decompress
from megatron_gkd.data.sources.csv_rows import read_csv
from megatron_gkd.data.sources.source import TEXT
from megatron_gkd.errors import UserError

_BATCH_ROWS = 1000
Table = TypeVar("Table", datasets.Dataset, datasets.IterableDataset)


@dataclass(frozen=True)
class DataFile:
    """A data file on this machine.

    Attributes:
        name: for messages: the path as the recipe names it, or a URL.
        path: of the file.
    """

    name: str
    path: Path

    def kind(self) -> tuple[str, str]:
        """Return the kind of the file and its compression ("" for none), by the ending of its name.

        Raises:
            UserError: it has another ending.
        """
        found = file_kind(self.name)
        if found is None:
            raise UserError(
                f"{self.name}: unknown kind of file; allowed are {ENDINGS}, and folders that "
                "datasets.Dataset.save_to_disk wrote"
            )
        return found


@dataclass(frozen=True)
class FileTable:
    """The rows of a file; see `Source` and `Part`."""

    table: datasets.Dataset
    is_json: bool
    unit: str


def open_file(file: DataFile, scratch: Path, columns: Mapping[str, str]) -> FileTable:
    """Open a data file.

    Args:
        file: of one of the known kinds.
        scratch: folder for this file's Arrow files, which must exist as long as the table is used.
        columns: new names of the columns; see `read_csv`.

    Raises:
        UserError: the file is of another kind, or cannot be read.
    """
    kind, compression = file.kind()
    try:
        path = decompress(file.path, compression, scratch / "plain") if compression else file.path
        if kind in ("parquet", "arrow"):
            return FileTable(without_decoding(_load(kind, path, scratch)), False, "row")
        if path.stat().st_size == 0:
            return FileTable(datasets.Dataset.from_dict({TEXT: []}), True, "line")
        if kind in ("csv", "tsv"):
            rows = read_csv(path, "," if kind == "csv" else "\t", columns)
            return FileTable(_write_texts(rows, scratch / "rows.arrow"), True, "row")
        if kind == "json" and _starts_with_bracket(path):
            return FileTable(
                _write_texts(split_list(path.read_text(encoding="utf-8-sig")), scratch / "rows.arrow"), True, "row"
            )
        # A byte that is not UTF-8 becomes \xNN, which JSON does not know: the row is reported as not JSON, by its line.
        lines = _load("text", path, scratch, encoding="utf-8-sig", encoding_errors="backslashreplace")
        return FileTable(lines, True, "line")
    except Exception as error:  # pyarrow, datasets and decompressors raise many kinds of error for a damaged file
        raise UserError(f"{file.name}: cannot be read: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """Return the first line of what went wrong."""
    is_wrapped = isinstance(error, DatasetGenerationError) and error.__cause__ is not None
    cause = error.__cause__ if is_wrapped else error
    return str(cause).strip().partition("\n")[0] or type(cause).__name__


def without_decoding(table: Table) -> Table:
    """Return a table whose columns of images, alone or in lists, hold encoded images rather than pixels."""
    encoded = datasets.Image(decode=False)
    for name, feature in (table.features or {}).items():  # of some streams they are not known
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, type(feature)(encoded))
    return table


def _load(builder: str, path: Path, scratch: Path, **kwargs: Any) -> datasets.Dataset:
    files = [glob.escape(str(path))]
    try:
        return datasets.load_dataset(builder, data_files=files, split="train", cache_dir=str(scratch), **kwargs)
    except ValueError as error:
        if "corresponds to no data" not in str(error):  # the words of `datasets` for a file without rows
            raise
        return datasets.Dataset.from_dict({})


def _write_texts(texts: Iterable[str], path: Path) -> datasets.Dataset:
    """Write JSON rows to an Arrow file, and open it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    batch: list[str] = []
    with ArrowWriter(features=datasets.Features({TEXT: datasets.Value("string")}), path=str(path)) as writer:
        for text in texts:
            batch.append(text)
            if len(batch) == _BATCH_ROWS:
                writer.write_batch({TEXT: batch})
                batch = []
        if batch:
            writer.write_batch({TEXT: batch})
        num_rows, _ = writer.finalize()
    return datasets.Dataset.from_file(str(path)) if num_rows else datasets.Dataset.from_dict({TEXT: []})


def _starts_with_bracket(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            if line.strip():
                return line.lstrip().startswith("[")
    return False

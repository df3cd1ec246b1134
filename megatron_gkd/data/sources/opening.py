"""Open a source by its name."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from megatron_gkd.config.dataset_names import FORMS, DatasetName, file_ending, file_kind
from megatron_gkd.data.sources.files import DataFile, open_file, reason_of, without_decoding
from megatron_gkd.data.sources.hub import load_hub
from megatron_gkd.data.sources.remote import describe_url, fetch_url
from megatron_gkd.data.sources.source import Part, Source
from megatron_gkd.errors import UserError


def parse_name(text: str) -> DatasetName:
    """Parse the name of a source.

    Raises:
        UserError: it is no name.
    """
    try:
        return DatasetName.parse(text)
    except ValueError as error:
        raise UserError(f"{text}: {error}") from error


def describe_source(name: DatasetName, *, use_hf: bool = True) -> list[Any]:
    """Return what changes when a source's rows do: its files with their sizes and times of change.

    A data set of a hub is fetched, if it is not cached.

    Raises:
        UserError: the source does not exist or cannot be reached.
    """
    if name.kind == "url":
        return describe_url(name.location)
    if name.kind == "pattern":
        return _stats(file.path for file in _match(name))
    root = Path(name.location)
    if name.kind == "path":
        _require_existing(name)
        return _stats([root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file()))
    table = load_hub(name, use_hf=use_hf)
    return [len(table), *_stats(Path(file["filename"]) for file in table.cache_files)]


def open_source(
    name: DatasetName | str, scratch: Path | str, *, use_hf: bool = True, columns: Mapping[str, str] | None = None
) -> Source:
    """Open the rows of a source.

    Args:
        name: of the source; its `size` is not looked at.
        scratch: folder for copies and Arrow files, which must exist as long as the source is used.
        use_hf: whether ids are those of Hugging Face's hub, or of ModelScope.
        columns: new names of its columns; they decide how cells of CSV files are read, but are not applied.

    Raises:
        UserError: the source does not exist, is of another kind, or cannot be read.
    """
    name, scratch = parse_name(name) if isinstance(name, str) else name, Path(scratch)
    if name.kind == "hub":
        return _as_source(name, name.text, load_hub(name, use_hf=use_hf), Path.cwd())
    files = find_files(name, scratch)
    if files is None:
        return _open_folder(name, use_hf=use_hf)
    return _open_files(name, files, scratch, columns, folder_of(name, files))


def find_files(name: DatasetName, scratch: Path) -> list[DataFile] | None:
    """Return the data files of a name; None for a folder or a data set of a hub.

    Args:
        name: of the source.
        scratch: folder for copies of files behind URLs.

    Raises:
        UserError: there is no such file, or it can't be fetched.
    """
    root = Path(name.location)
    if name.kind == "hub":
        return None
    if name.kind == "url":
        return fetch_url(name.location, scratch / "fetched")
    if name.kind == "pattern":
        return _match(name)
    _require_existing(name)
    if root.is_dir():
        return None
    if name.parts:
        raise UserError(f"{name.text}: {root} is a file, which has neither subsets nor splits; write {root}")
    return [DataFile(name.location, root)]


def is_saved_folder(name: DatasetName) -> bool:
    """Return whether a name is that of a folder that `datasets` saved."""
    root = Path(name.location)
    return name.kind == "path" and any((root / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _open_files(
    name: DatasetName, files: Sequence[DataFile], scratch: Path, columns: Mapping[str, str] | None, base: Path
) -> Source:
    opened = [open_file(file, scratch / f"{index:06}", columns or {}) for index, file in enumerate(files)]
    other = next((index for index, one in enumerate(opened) if one.is_json != opened[0].is_json), None)
    if other is not None:
        raise UserError(
            f"{name.text}: {files[0].name} and {files[other].name} are of different kinds, text and tables; name them "
            "by two patterns"
        )
    try:
        table = datasets.concatenate_datasets([one.table for one in opened if len(one.table)] or [opened[0].table])
    except Exception as error:
        raise UserError(f"{name.text}: the files have different columns: {reason_of(error)}") from error
    parts = [Part(file.name, one.unit, len(one.table)) for file, one in zip(files, opened, strict=True)]
    return Source(name.text, table, opened[0].is_json, tuple(parts), base)


def _open_folder(name: DatasetName, *, use_hf: bool) -> Source:
    root, shown = Path(name.location), name.location
    if (root / "dataset_dict.json").is_file():
        split = _choose_split(name)
        root, shown = root / split, f"{name.location}:{split}"
    elif not (root / "state.json").is_file():
        if not any(file_kind(file.name) for file in root.rglob("*") if file.is_file()):
            raise UserError(
                f"{name.location}: not a folder that datasets.Dataset.save_to_disk wrote (it has no state.json), and "
                "no copy of a hub's data set (it has no data files)"
            )
        return _as_source(name, name.text, load_hub(name, use_hf=use_hf), root.resolve())
    elif name.parts:
        raise UserError(f"{name.text}: {root} has one split; write {root}")
    try:
        state = json.loads((root / "state.json").read_text(encoding="utf-8"))
        has_rows = bool(state["_data_files"])  # `datasets` fails for a folder without any
        loaded = datasets.load_from_disk(str(root)) if has_rows else datasets.Dataset.from_dict({})
        table = without_decoding(loaded.with_format(None))
    except Exception as error:
        raise UserError(f"{shown}: cannot be read: {reason_of(error)}") from error
    return _as_source(name, shown, table, root.resolve())


def _choose_split(name: DatasetName) -> str:
    try:
        splits = json.loads((Path(name.location) / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name.location}: cannot be read: dataset_dict.json names no splits") from error
    if len(name.parts) == 1 and name.parts[0] in splits:
        return name.parts[0]
    if not name.parts and len(splits) == 1:
        return splits[0]
    problem = f"has no split {':'.join(name.parts)}" if name.parts else "holds several splits"
    raise UserError(f"{name.location}: {problem} ({', '.join(splits)}); name one of them ({name.location}:{splits[0]})")


def _as_source(name: DatasetName, shown: str, table: datasets.Dataset, base: Path) -> Source:
    return Source(name.text, table, False, (Part(shown, "row", len(table)),), base)


def _match(name: DatasetName) -> list[DataFile]:
    paths = sorted(path for path in glob.glob(name.location, recursive=True) if Path(path).is_file())
    if not paths:
        raise UserError(f"{name.text}: no file matches this pattern")
    return [DataFile(path, Path(path)) for path in paths]


def folder_of(name: DatasetName, files: Sequence[DataFile]) -> Path:
    """Return the folder of all files, or the innermost one that holds theirs; this one for copies of URLs' files."""
    if name.kind == "url":
        return Path.cwd()
    folders = [file.path.resolve().parent for file in files]
    return Path(os.path.commonpath(folders))


def _require_existing(name: DatasetName) -> None:
    if not Path(name.location).exists():
        hint = "" if file_ending(name.text) else f"; must be {FORMS}"
        raise UserError(f"{name.text}: no such file or folder{hint}")


def _stats(files: Iterable[Path]) -> list[Any]:
    return [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

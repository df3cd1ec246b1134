"""Sources whose rows are read in order, a few at a time, from any row on."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets

from megatron_gkd.config.dataset_names import DatasetName
from megatron_gkd.data.sources.files import DataFile, reason_of, without_decoding
from megatron_gkd.data.sources.hub import stream_hub
from megatron_gkd.data.sources.opening import describe_source, find_files, folder_of, is_saved_folder, open_source
from megatron_gkd.data.streams.files import CsvFile, LineFile, StreamFile, TableFile
from megatron_gkd.errors import UserError

_HASHED_BYTES = 65536  # at the start and at the end of each file


@dataclass(frozen=True)
class StreamSource:
    """Rows of one source, undecoded as those of `sources.Source`.

    Attributes:
        name: as the recipe names it.
        files: in the order of their rows.
        is_json: whether rows are JSON text.
        base: folder to which paths of images are relative.
        identity: of its content, without reading all of it; equal where files are equal, wherever they are.
    """

    name: str
    files: tuple[StreamFile, ...]
    is_json: bool
    base: Path
    identity: str
    _sizes: dict[int, int] = field(default_factory=dict, compare=False)  # of the files that were read to the end

    def read(self, start: int) -> Iterator[dict[str, Any]]:
        """Yield the rows from `start` (counted from 0) to the end.

        Raises:
            UserError: the source can't be read.
        """
        for number, file in enumerate(self.files):
            if start < self._sizes.get(number, start + 1):
                try:
                    self._sizes[number] = yield from file.rows(start)
                except UserError:
                    raise
                except Exception as error:  # pyarrow, datasets and network clients raise many kinds of error
                    raise UserError(f"{file.name}: cannot be read: {reason_of(error)}") from error
            start = max(0, start - self._sizes[number])

    def locate(self, index: int) -> str:
        """Return the place of row `index` (from 0), which was read, for messages: `train.jsonl, line 3`."""
        for number, file in enumerate(self.files):
            size = self._sizes.get(number, index + 1)
            if index < size:
                return f"{file.name}, {file.unit} {index + 1}"
            index -= size
        raise IndexError(f"{self.name} has no row {index}")


def open_stream(
    name: DatasetName, scratch: Path, *, use_hf: bool = True, columns: Mapping[str, str] | None = None
) -> StreamSource:
    """Open a source without reading its rows. Files behind URLs are copied, as are data sets of ModelScope.

    Args:
        name: of the source.
        scratch: folder for copies, which must exist as long as the source is used.
        use_hf: whether ids are those of Hugging Face's hub, or of ModelScope.
        columns: see `open_source`.

    Raises:
        UserError: the source does not exist, is of another kind, or cannot be read.
    """
    files = find_files(name, scratch)
    if files is not None:
        identity = _hash(describe_source(name)) if name.kind == "url" else _hash_of_content(files)
        return _open_files(name, files, scratch, columns or {}, identity)
    streamed = None if is_saved_folder(name) else stream_hub(name, use_hf=use_hf)
    if streamed is not None:
        table, state = streamed
        base = Path(name.location).resolve() if name.kind == "path" else Path.cwd()
        return StreamSource(name.text, (TableFile(name.text, table),), False, base, _hash(state))
    source = open_source(name, scratch, use_hf=use_hf)
    identity = _hash_of_content(DataFile(file, Path(file)) for file in sorted(_files_of(source.table)))
    return StreamSource(name.text, (TableFile(source.parts[0].name, source.table),), False, source.base, identity)


def _open_files(
    name: DatasetName, files: Sequence[DataFile], scratch: Path, columns: Mapping[str, str], identity: str
) -> StreamSource:
    base = folder_of(name, files)
    kinds = [file.kind() for file in files]
    tables = [file for file, (kind, _) in zip(files, kinds, strict=True) if kind in ("parquet", "arrow")]
    if not tables:
        opened = [
            _open_text(file, kind, compression, scratch / f"{index:06}.csv", columns)
            for index, (file, (kind, compression)) in enumerate(zip(files, kinds, strict=True))
        ]
        return StreamSource(name.text, tuple(opened), True, base, identity)
    if len({kind for kind, _ in kinds}) > 1:
        other = next(file.name for file, (kind, _) in zip(files, kinds, strict=True) if kind != kinds[0][0])
        raise UserError(f"{name.text}: {files[0].name} and {other} are of different kinds; name them by two patterns")
    try:
        paths = [glob.escape(str(file.path)) for file in files]
        table = datasets.load_dataset(kinds[0][0], data_files=paths, split="train", streaming=True)
        table = without_decoding(table)
    except Exception as error:
        raise UserError(f"{name.text}: cannot be read: {reason_of(error)}") from error
    return StreamSource(name.text, (TableFile(name.text, table),), False, base, identity)


def _open_text(file: DataFile, kind: str, compression: str, plain: Path, columns: Mapping[str, str]) -> StreamFile:
    if kind in ("csv", "tsv"):
        return CsvFile(file.name, file.path, compression, plain, "," if kind == "csv" else "\t", columns)
    return LineFile(file.name, file.path, compression, may_be_list=kind == "json")


def _files_of(table: datasets.Dataset) -> list[str]:
    return [file["filename"] for file in table.cache_files]


def _hash(state: Any) -> str:
    return hashlib.blake2b(json.dumps(state, default=str).encode(), digest_size=16).hexdigest()


def _hash_of_content(files: Iterable[DataFile]) -> str:
    """Hash the sizes of files, and the start and the end of each."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        size = file.path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with file.path.open("rb") as content:
            digest.update(content.read(_HASHED_BYTES))
            content.seek(max(0, size - _HASHED_BYTES))
            digest.update(content.read(_HASHED_BYTES))
    return digest.hexdigest()

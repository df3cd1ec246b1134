"""Decompression of text files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa


def decompress(path: Path, compression: str, target: Path) -> Path:
    """Write the content of a compressed file into `target`, and return that.

    Args:
        path: the compressed file.
        compression: the ending of its name: gz, zst, xz or bz2.
        target: the file to write.

    Raises:
        OSError, EOFError, lzma.LZMAError: the file is truncated, or no such file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with open_compressed(path, compression) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file)
    return target


def open_compressed(path: Path, compression: str) -> Any:
    """Open the content of a compressed file for reading. The arguments are those of `decompress`."""
    if compression == "zst":  # fsspec would need the package zstandard
        return pa.input_stream(str(path), compression="zstd")
    return fsspec.open(str(path), "rb", compression={"gz": "gzip"}.get(compression, compression)).open()

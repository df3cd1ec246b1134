"""Find a model's files on every node: a directory that all nodes have, or a download from the hub."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.hubs import WANTED, WANTED_BESIDE_WEIGHTS, ModelSource, download, download_configuration
from megatron_gkd.runtime.nodes import Nodes


@dataclass(frozen=True)
class Location:
    """Where a model is.

    Attributes:
        path: its directory.
        revision: commit of a download from Hugging Face; of one from ModelScope the revision that was asked for, by
            default its main branch; None for a directory.
    """

    path: Path
    revision: str | None = None


@dataclass(frozen=True)
class _Files:
    """The files of a model on rank 0's node.

    Attributes:
        is_directory: whether the model is a directory.
        revision: see `Location`.
        sizes: size of each file in bytes.
    """

    is_directory: bool
    revision: str | None
    sizes: dict[str, int]


def locate(source: ModelSource, nodes: Nodes) -> Location:
    """Find a directory or a hub id. All ranks must call it.

    Rank 0 decides which of the two it is, and downloads first; then one rank of each node downloads missing files.

    Raises:
        RunStopped: in all ranks; there is no such directory or hub model, or a node's directory is not that of rank 0.
    """
    found = nodes.on_main(lambda: _find(source))
    nodes.on_leaders(lambda: _check_directory(source.name, found) if found.is_directory else _complete(source, found))
    if found.is_directory:
        return Location(Path(source.name))
    path = nodes.on_all(lambda: download(source, found.revision, local_files_only=True))
    return Location(path, found.revision)


def locate_configuration(source: ModelSource) -> Path:
    """Return a local directory with the config.json of a directory or a hub id, and perhaps nothing else.

    Raises:
        UserError: there is no such directory or hub model.
    """
    if source.is_directory:
        return Path(source.name)
    try:
        return download_configuration(source)
    except UserError as error:
        raise UserError(f"{source}: no local directory, and {error}") from error


def locate_without_weights(source: ModelSource) -> Path:
    """Return a local directory with all files of a model, a directory or a hub id, but those of its weights.

    Raises:
        UserError: there is no such directory or hub model.
    """
    if source.is_directory:
        return Path(source.name)
    return download(source, source.revision, patterns=WANTED_BESIDE_WEIGHTS)


def _find(source: ModelSource) -> _Files:
    if source.is_directory:
        return _Files(True, None, _sizes(Path(source.name)))
    path = download(source, source.revision)
    # Hugging Face's cache has a folder of each commit.
    return _Files(False, path.name if source.use_hf else source.revision or "master", _sizes(path))


def _check_directory(model: str, found: _Files) -> None:
    here = f"{model}: on the node {socket.gethostname()}"
    if not Path(model).is_dir():
        raise UserError(f"{here} there is no such directory; every node needs it")
    sizes = _sizes(Path(model))
    for name, size in found.sizes.items():
        if sizes.get(name) != size:
            state = "is missing" if name not in sizes else f"has {sizes[name]} bytes instead of {size}"
            raise UserError(f"{here} {name} {state}; every node needs the same files as that of rank 0")


def _complete(source: ModelSource, found: _Files) -> None:
    """Download the files that this node lacks: rank 0 may have another cache."""
    try:
        if _sizes(download(source, found.revision, local_files_only=True)) == found.sizes:
            return
    except UserError:  # this node has no files of it
        pass
    download(source, found.revision)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for pattern in WANTED for file in sorted(folder.glob(pattern))}

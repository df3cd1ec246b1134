"""Find a model's files on every node: a directory that all nodes have, or a download from the hub."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.nodes import Nodes

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class _Files:
    """The files of a model on rank 0's node.

    Attributes:
        revision: the hub's name of the downloaded commit; None for a directory.
        sizes: size of each file in bytes.
    """

    revision: str | None
    sizes: dict[str, int]


def locate(model: str, nodes: Nodes) -> Path:
    """Return the local directory of `model`, a directory or a hub id. All ranks must call it.

    Rank 0 decides which of the two it is, and downloads first; then one rank of each node downloads missing files.

    Raises:
        RunStopped: in all ranks; there is no such directory or hub model, or a node's directory is not that of rank 0.
    """
    found = nodes.on_main(lambda: _find(model))
    nodes.on_leaders(lambda: _check_directory(model, found) if found.revision is None else _complete(model, found))
    if found.revision is None:
        return Path(model)
    return nodes.on_all(lambda: _download(model, found.revision, local_files_only=True))


def _find(model: str) -> _Files:
    if Path(model).is_dir():
        return _Files(None, _sizes(Path(model)))
    path = _download(model)
    return _Files(path.name, _sizes(path))


def _check_directory(model: str, found: _Files) -> None:
    here = f"{model}: on the node {socket.gethostname()}"
    if not Path(model).is_dir():
        raise UserError(f"{here} there is no such directory; every node needs it")
    sizes = _sizes(Path(model))
    for name, size in found.sizes.items():
        if sizes.get(name) != size:
            state = "is missing" if name not in sizes else f"has {sizes[name]} bytes instead of {size}"
            raise UserError(f"{here} {name} {state}; every node needs the same files as that of rank 0")


def _complete(model: str, found: _Files) -> None:
    """Download the files that this node lacks: rank 0 may have another cache."""
    try:
        if _sizes(_download(model, found.revision, local_files_only=True)) == found.sizes:
            return
    except UserError:  # this node has no files of it
        pass
    _download(model, found.revision)


def _sizes(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_size for pattern in WANTED for file in sorted(folder.glob(pattern))}


def _download(model: str, revision: str | None = None, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(model, revision=revision, allow_patterns=WANTED, local_files_only=local_files_only)
    except Exception as error:  # the hub's client raises many kinds, all of which mean the same to the user
        raise UserError(
            f"{model}: neither a local directory nor a hub model that can be downloaded ({error})"
        ) from error
    return Path(path)

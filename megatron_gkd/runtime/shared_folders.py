"""Find out whether all nodes see one folder: rank 0 writes a file there, and one rank of each node reads it."""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path

from megatron_gkd.errors import UserError
from megatron_gkd.runtime.nodes import Nodes

VISIBLE_WITHIN_S = 30.0  # clients of network file systems cache the content of folders for some seconds


def require_shared(key: str, folder: Path, nodes: Nodes) -> None:
    """Check that one rank of each node sees what rank 0 writes into `folder`. All ranks must call it.

    Args:
        key: the recipe key that names the folder, for messages.
        folder: made if missing.
        nodes: the ranks.

    Raises:
        RunStopped: in all ranks; a node does not see the folder of rank 0, or it can't be written to.
    """
    name, token = f".probe-{secrets.token_hex(8)}", secrets.token_hex(16)
    name, token = nodes.on_main(lambda: _write(key, folder, name, token))
    try:
        nodes.on_leaders(lambda: _read(key, folder, name, token, is_writer=nodes.is_main))
    finally:
        if nodes.is_main:
            (folder / name).unlink(missing_ok=True)


def _write(key: str, folder: Path, name: str, token: str) -> tuple[str, str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(token)
    except OSError as error:
        raise UserError(f"{key} = {folder}: can't be written to ({error})") from error
    return name, token


def _read(key: str, folder: Path, name: str, token: str, *, is_writer: bool) -> None:
    if is_writer:
        return
    deadline = time.monotonic() + VISIBLE_WITHIN_S
    while True:
        try:
            if (folder / name).read_text() == token:
                return
            os.listdir(folder)  # makes the file system's client read the folder again
        except OSError:
            pass
        if time.monotonic() >= deadline:
            raise UserError(
                f"{key} = {folder}: the node {socket.gethostname()} does not see the file that rank 0 has written "
                "there; must be on a file system that all nodes share"
            )
        time.sleep(0.2)

"""Write files and folders that survive a crash of the machine, and keep what is already there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_NO_FOLDER_FSYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP)  # of file systems without it


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk.

    Some network and user-space file systems can't do that for a folder; there it does nothing.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def publish(unfinished: Path, final: Path) -> None:
    """Move a finished file or folder to its final name in one step; it is on disk before and after that step.

    A file at `final` is replaced. A folder at `final` must be empty or absent.

    Raises:
        OSError: the disk is full or read-only, or there is a folder with content at `final`.
    """
    if unfinished.is_dir():
        for path in unfinished.rglob("*"):
            flush(path)
    flush(unfinished)
    unfinished.replace(final)
    flush(final.parent)


def replace_text(path: Path, text: str) -> None:
    """Write `text` as the whole content of the file at `path`; an interruption leaves the former content."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    publish(unfinished, path)


def find_free_path(path: Path) -> Path:
    """Return `path` with the first number appended that is not taken: `hf.1`, then `hf.2`, and so on."""
    number = 1
    while (free := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return free

"""Files that are to survive: a crash of the machine, and what is written into the same place later."""

from __future__ import annotations

import os
from pathlib import Path


def flush(path: Path) -> None:
    """Returns when the file, or the folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_place(path: Path) -> Path:
    """Return the path with the first number behind it that is not taken: `hf.1`, then `hf.2`, and so on."""
    number = 1
    while (place := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return place

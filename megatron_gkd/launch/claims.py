"""Print a message once on a node under torchrun, though several of its ranks have it.

torchrun ends all ranks as soon as one exits, and any of them may be the first. So the first rank that has a message to
print claims it by creating a file, and the others exit once it is printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PRINTED_WITHIN_S = 5.0  # after that, the rank with the claim is assumed to be dead
KEPT_S = 3600.0


def print_once(message: str, prefix: str = "") -> None:
    """Print `message` to stderr, unless another rank of this node and attempt of torchrun has done so."""
    claim = _file(message, os.environ)
    if claim is None or _create(claim) or not _is_printed(claim):
        print(f"{prefix}{message}", file=sys.stderr, flush=True)
        if claim is not None:
            with contextlib.suppress(OSError):
                claim.write_text("printed")


def _file(message: str, environment: Mapping[str, str]) -> Path | None:
    """Return the file that stands for `message` in this attempt of torchrun; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    agent = os.getppid()
    parts = (
        environment["TORCHELASTIC_RUN_ID"],
        environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
        environment.get("GROUP_RANK", "0"),
        str(agent),
        _start_time(agent),  # process ids are reused
        message,
    )
    name = hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:32]
    return Path(tempfile.gettempdir()) / f"megatron-gkd-{os.getuid()}" / name


def _start_time(process: int) -> str:
    """Return when a process started, in the kernel's ticks; an empty text where there is no /proc."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


def _create(claim: Path) -> bool:
    """Return whether this process may print: it has created the file, or none can be created here."""
    try:
        claim.parent.mkdir(mode=0o700, exist_ok=True)
        _remove_old(claim.parent)
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _is_printed(claim: Path) -> bool:
    """Wait until the rank that has the claim has printed; return False if it does not."""
    deadline = time.monotonic() + PRINTED_WITHIN_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if claim.stat().st_size:
                return True
        time.sleep(0.02)
    return False


def _remove_old(folder: Path) -> None:
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > KEPT_S:
                file.unlink()

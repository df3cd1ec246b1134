"""Raise the limit on open files: the process with the store has two connections to each rank."""

from __future__ import annotations

import contextlib
import resource

WANTED = 65536


def raise_open_files_limit() -> None:
    """Raise this process's soft limit on open files, which is often 1024, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

"""Whether the kernel has killed processes for lack of memory."""

from __future__ import annotations

import re
from pathlib import Path

_VMSTAT = Path("/proc/vmstat")


def count_memory_kills() -> int:
    """Return how many processes the kernel of this machine has killed for lack of memory; 0 where that is unknown."""
    try:
        found = re.search(r"^oom_kill (\d+)$", _VMSTAT.read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0

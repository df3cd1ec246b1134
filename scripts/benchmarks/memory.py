"""How much memory a piece of work needs at its peak, beyond what was there before it."""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK_RSS = "5"  # proc(5): resets VmHWM to the present resident set size


class PeakMemory:
    """Context manager; afterwards `growth` is the peak less the start, in bytes, or None where it can't be measured.

    On CUDA it counts the caching allocator's tensors. On Linux's CPU it is the resident set of the process: it also
    sees scratch memory that never was a tensor. What malloc keeps of freed memory is returned to the system first,
    because work in it would not be counted.
    """

    growth: int | None = None

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            self._start = _resident_after_reset()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._cuda:
            self.growth = torch.cuda.max_memory_allocated() - self._start
        elif self._start is not None:
            self.growth = status_bytes("VmHWM") - self._start


def _resident_after_reset() -> int | None:
    resident = trim()
    return resident if reset_peak() else None


def trim() -> int | None:
    """Return what malloc keeps of freed memory to the system. Returns the resident bytes; None if not on Linux."""
    if sys.platform != "linux":
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # not glibc: nothing to give back
        pass
    return status_bytes("VmRSS")


def reset_peak() -> bool:
    """Let `status_bytes("VmHWM")` be the peak from now on. Returns False where that is not possible."""
    if sys.platform != "linux":
        return False
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK_RSS)
    except OSError:  # some containers forbid it
        return False
    return True


def status_bytes(field: str) -> int:
    """Return a size in bytes from this process's status."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024

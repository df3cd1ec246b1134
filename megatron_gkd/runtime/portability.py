"""Find the device that this process computes on, and hide the difference between CUDA and CPU from the other modules.

This is the only module that looks whether there is a GPU; the loss in `ops` goes by where its tensors are
(`tests/runtime/test_boundaries.py`). On a machine with CUDA nothing here changes anything. Without it,
`make_portable()` lets the real Megatron-Core run on CPUs with gloo. `runtime.meta_device` lets it run without any
device, on tensors that have shapes but no memory.

Megatron-Core and mcore-bridge must be imported after `make_portable()`; `runtime.preload` does it in the right order.
"""

from __future__ import annotations

import contextlib
import platform
import re
import sys
from pathlib import Path

import torch

_CPU, _META = torch.device("cpu"), torch.device("meta")
_is_applied = False
_has_no_memory = False


def _has_cuda() -> bool:
    return not _has_no_memory and torch.cuda.is_available()


def compute_without_memory() -> None:
    """Let this process compute on the meta device, in the place of a GPU. Call it before `make_portable`."""
    global _has_no_memory
    if _is_applied:
        raise RuntimeError("the process has a device already; use the meta device in a process of its own")
    _has_no_memory = True


def has_no_memory() -> bool:
    """Return whether this process computes on the meta device."""
    return _has_no_memory


def device() -> torch.device:
    """Return the device that this process computes on."""
    if _has_no_memory:
        return _META
    return torch.device("cuda", torch.cuda.current_device()) if _has_cuda() else _CPU


def creation_on_device() -> contextlib.AbstractContextManager[object]:
    """Create tensors without a named device on the meta device inside, if this process computes there."""
    return _META if _has_no_memory else contextlib.nullcontext()


def device_name() -> str:
    """Return the product name of the GPU, or of the processor where there is none."""
    if _has_cuda():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"CPU ({found[1] if found else platform.processor() or platform.machine()})"


def backend() -> str:
    """Return the torch.distributed backend of the device."""
    if _has_no_memory:
        return "fake"
    return "nccl" if _has_cuda() else "gloo"


def sends_are_stream_ordered() -> bool:
    """Return whether a tensor may be freed while its send is under way, as NCCL allows and gloo does not."""
    return _has_cuda() or _has_no_memory


def builds_on_host() -> bool:
    """Return whether Megatron should create parameters in host memory: true where there is no other."""
    return not _has_cuda() and not _has_no_memory


def select_device(local_rank: int) -> None:
    """Bind this process to its device, before any process group exists."""
    if _has_cuda():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())


def num_gpus() -> int:
    """Return how many GPUs this process sees."""
    return torch.cuda.device_count()


def compute_capability() -> tuple[int, int] | None:
    """Return the compute capability of the GPU, major and minor; None where there is none."""
    return torch.cuda.get_device_capability() if _has_cuda() else None


def synchronize() -> None:
    """Wait for the device, so that a clock that is read next includes its work."""
    if _has_cuda():
        torch.cuda.synchronize()


def empty_cache() -> None:
    """Return memory that torch holds but does not use to the device."""
    if _has_cuda():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Return the highest memory use so far in bytes: the allocator's on a GPU, the process's resident set on a CPU."""
    if _has_cuda():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def random_state() -> torch.Tensor | None:
    """Return the device's random state; None where it is that of the host."""
    return torch.cuda.get_rng_state() if _has_cuda() else None


def set_random_state(state: torch.Tensor | None) -> None:
    """Set what `random_state` returned on a machine of the same kind."""
    if _has_cuda() and state is not None:
        torch.cuda.set_rng_state(state)


def pinned_bytes(num_bytes: int) -> torch.Tensor:
    """Return uninitialized host memory as a uint8 tensor, page-locked where that speeds up copies."""
    where = _META if _has_no_memory else _CPU
    return torch.empty(num_bytes, dtype=torch.uint8, device=where, pin_memory=_has_cuda())


def make_portable() -> None:
    """Let Megatron-Core run without CUDA. Idempotent; does nothing where a CUDA device is present."""
    global _is_applied
    if _is_applied:
        return
    _is_applied = True
    if not _has_cuda():
        from megatron_gkd.runtime.cpu_patches import apply_cpu_patches

        apply_cpu_patches()

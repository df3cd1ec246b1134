"""Limits of the operating system: shared memory, locked memory, open files."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

from megatron_gkd.config.schema import Recipe
from megatron_gkd.doctor.finding import Finding
from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.doctor.subject import Subject

SHARED_MEMORY = "/dev/shm"
_SHARED_MEMORY_OF_A_RANK = 2**29
_OPEN_FILES = 4096


def find_shared_memory(subject: Subject) -> Iterator[Finding]:
    """Compare the size of shared memory with what NCCL and the loader's workers of all ranks take."""
    needed = subject.nproc * _SHARED_MEMORY_OF_A_RANK
    try:
        size = shared_memory_bytes()
    except OSError as error:
        yield Finding("shared memory", "warning", f"{SHARED_MEMORY}: {error.strerror}", "mount a tmpfs there")
        return
    text = f"{SHARED_MEMORY} has {size / 2**30:.1f} GiB"
    if size < needed:
        remedy = f"start the container with --shm-size={-(-needed // 2**30)}g, or with --ipc=host"
        processes = f"{subject.nproc} process" + ("es" if subject.nproc > 1 else "")
        yield Finding("shared memory", "warning", f"{text}, little for {processes}", remedy)
    else:
        yield Finding("shared memory", "ok", text)


def shared_memory_bytes() -> int:
    """Return the size of shared memory."""
    found = os.statvfs(SHARED_MEMORY)
    return found.f_frsize * found.f_blocks


def find_locked_memory(subject: Subject) -> Iterator[Finding]:
    """Report the limit on locked memory, which RDMA and page-locked copies of weights need."""
    limit = locked_memory_limit()
    if limit is None:
        yield Finding("locked memory", "ok", "unlimited")
        return
    text = f"limited to {limit / 2**20:.0f} MiB"
    has_gpus = not isinstance(subject.torch, Outcome) and bool(subject.torch.gpus)
    if not has_gpus:
        yield Finding("locked memory", "ok", f"{text}; it matters on GPUs alone")
        return
    remedy = "raise it: `ulimit -l unlimited`, --ulimit memlock=-1 of a container, or LimitMEMLOCK of slurmd"
    offloads = [] if subject.recipe is None else list(_offloading_keys(subject.recipe))
    reason = f" with {', '.join(offloads)}" if offloads else " over InfiniBand"
    yield Finding("locked memory", "warning", f"{text}, too little{reason}", remedy)


def locked_memory_limit() -> int | None:
    """Return the limit in bytes; None without one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _offloading_keys(recipe: Recipe) -> Iterator[str]:
    for place, teacher in recipe.teacher.all.items():
        if teacher.offload_teacher_model:
            yield f"{place}.offload_teacher_model"
        if teacher.teacher_states == "host":
            yield f"{place}.teacher_states = host"
    for key in ("offload_model", "offload_optimizer", "optimizer_cpu_offload"):
        if getattr(recipe.memory, key):
            yield f"memory.{key}"


def find_open_files(_: Subject) -> Iterator[Finding]:
    """Report the limit on open files: ranks have sockets to each other, and the loader's workers pass files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _OPEN_FILES:
        yield Finding("open files", "ok", "unlimited" if soft == resource.RLIM_INFINITY else f"up to {soft}")
        return
    remedy = "raise it: `ulimit -n 65536`"
    if hard != resource.RLIM_INFINITY and hard < _OPEN_FILES:
        remedy += f"; the hard limit is {hard}, which the administrator can raise (limits.conf)"
    yield Finding("open files", "warning", f"limited to {soft}, little for many ranks and loader workers", remedy)

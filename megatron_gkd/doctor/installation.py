"""torch, the compiled kernels, GPUs and the backends of torch.distributed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

from megatron_gkd.doctor.finding import Finding
from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.doctor.subject import Subject
from megatron_gkd.doctor.torch_facts import TorchFacts

_BUILD = "pip install --no-build-isolation -e ."


def find_torch(subject: Subject) -> Iterator[Finding]:
    """Report whether torch can be imported."""
    facts = subject.torch
    if isinstance(facts, Outcome):
        remedy = "install another build of torch: pip install --force-reinstall torch==2.13.0"
        yield Finding("torch", "failed", f"can't be used: {facts.problem}", remedy)
    else:
        built_for = f"CUDA {facts.cuda}" if facts.cuda else "CPUs"
        yield Finding("torch", "ok", f"{facts.version}, built for {built_for}")


def find_kernels(subject: Subject) -> Iterator[Finding]:
    """Report the compiled kernels of the loss."""
    facts = subject.torch
    if isinstance(facts, Outcome):
        return
    extension = facts.extension
    if os.environ.get("MEGATRON_GKD_IMPL") == "torch":
        text = "switched off by MEGATRON_GKD_IMPL = torch: the loss is computed in plain torch"
        yield Finding("compiled kernels", "warning", text, "unset MEGATRON_GKD_IMPL")
    elif not extension.exists:
        text = "not built: the loss is computed in plain torch, more slowly"
        yield Finding("compiled kernels", "warning", text, f"with a C++ compiler: {_BUILD}")
    elif extension.problem is not None:
        text = f"can't be used with torch {facts.version}: {extension.problem}"
        yield Finding("compiled kernels", "failed", text, f"build them for this torch: {_BUILD}")
    else:
        kinds = f"CPU ({extension.instruction_set})" + (", CUDA" if extension.has_cuda else "")
        yield Finding("compiled kernels", "ok", f"{kinds}, built for this torch")
        if facts.gpus and not extension.has_cuda:
            text = "without CUDA: on GPUs the loss is computed in plain torch"
            yield Finding("GPU kernels", "warning", text, f"with nvcc: MEGATRON_GKD_CUDA=1 {_BUILD}")


def find_gpus(subject: Subject) -> Iterator[Finding]:
    """Report the GPUs, and whether the kernels run on them."""
    facts = subject.torch
    if isinstance(facts, Outcome):
        return
    driver = driver_report()
    if not facts.gpus:
        yield _without_gpus(facts, driver)
        return
    for index, gpu in enumerate(facts.gpus):
        text = f"{gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB, compute capability {gpu.capability}"
        if index < len(driver):
            text += f", driver {driver[index]}"
        if gpu.problem is None:
            yield Finding(f"GPU {index}", "ok", text)
        else:
            remedy = f"build the kernels for it: TORCH_CUDA_ARCH_LIST={gpu.capability} MEGATRON_GKD_CUDA=1 {_BUILD}"
            yield Finding(f"GPU {index}", "failed", f"{text}: the kernels do not run: {gpu.problem}", remedy)
    if subject.nproc > len(facts.gpus):
        text = f"{len(facts.gpus)} for {subject.nproc} processes"
        yield Finding("GPUs", "failed", text, f"start at most {len(facts.gpus)} processes on this machine (--nproc)")


def _without_gpus(facts: TorchFacts, driver: list[str]) -> Finding:
    if not driver:
        return Finding("GPUs", "ok", "none: computes on CPUs")
    if facts.cuda is None:
        remedy = "install a build of torch with CUDA: pip install --force-reinstall torch"
        return Finding("GPUs", "failed", f"nvidia-smi lists {len(driver)}, but torch is built for CPUs", remedy)
    remedy = f"check CUDA_VISIBLE_DEVICES, and that the driver ({driver[0]}) is new enough for CUDA {facts.cuda}"
    return Finding("GPUs", "failed", f"nvidia-smi lists {len(driver)}, but torch sees none", remedy)


def driver_report() -> list[str]:
    """Return the driver's version for each GPU that nvidia-smi lists; an empty list where it is not there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return found.stdout.split("\n")[:-1] if found.returncode == 0 else []


def find_backends(subject: Subject) -> Iterator[Finding]:
    """Report the backends of torch.distributed."""
    facts = subject.torch
    if isinstance(facts, Outcome):
        return
    if facts.has_gloo:
        yield Finding("gloo", "ok", "available")
    else:
        yield Finding("gloo", "failed", "torch is built without it", "install a build of torch from pytorch.org")
    if facts.gpus and facts.nccl is None:
        yield Finding("NCCL", "failed", "torch is built without it", "install a build of torch from pytorch.org")
    elif facts.nccl is not None:
        yield Finding("NCCL", "ok", facts.nccl)

"""What torch and the compiled kernels report, in a process of its own: `python -m megatron_gkd.doctor.torch_facts`.

A torch that can't be imported, or that ends its process, is found and breaks nothing here.
"""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_gkd.doctor.processes import Outcome, run_python

SECONDS = 120.0
_MARK = "torch facts: "


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees.

    Attributes:
        name: of the product.
        memory_bytes: whole memory.
        capability: compute capability, `9.0`.
        problem: why the compiled kernels do not run on it; None if they do, or if there are none.
    """

    name: str
    memory_bytes: int
    capability: str
    problem: str | None = None


@dataclass(frozen=True)
class Extension:
    """The compiled kernels of the loss.

    Attributes:
        exists: whether there is a file.
        problem: why it can't be used; None if it can.
        instruction_set: of the CPU kernels: `avx512`, `avx2` or `default`.
        has_cuda: whether there are GPU kernels.
    """

    exists: bool
    problem: str | None = None
    instruction_set: str | None = None
    has_cuda: bool = False


@dataclass(frozen=True)
class TorchFacts:
    """What torch reports.

    Attributes:
        version: of torch.
        cuda: version of CUDA that torch is built for; None for a torch without it.
        has_gloo: whether the gloo backend is there.
        nccl: version of NCCL; None without it.
        extension: the compiled kernels.
        gpus: the visible ones.
    """

    version: str
    cuda: str | None
    has_gloo: bool
    nccl: str | None
    extension: Extension
    gpus: tuple[Gpu, ...] = field(default=())


def read_facts(seconds: float = SECONDS) -> TorchFacts | Outcome:
    """Return what torch reports in another process, or how that process failed."""
    outcome = run_python(["-m", "megatron_gkd.doctor.torch_facts"], seconds)
    lines = [line for line in outcome.stdout.splitlines() if line.startswith(_MARK)]
    if outcome.code != 0 or not lines:
        return outcome
    values: dict[str, Any] = json.loads(lines[-1].removeprefix(_MARK))
    values["extension"] = Extension(**values["extension"])
    values["gpus"] = tuple(Gpu(**gpu) for gpu in values["gpus"])
    return TorchFacts(**values)


def find_facts() -> TorchFacts:
    """Return what torch reports in this process."""
    import torch
    import torch.distributed as dist

    extension = _find_extension()
    return TorchFacts(
        version=torch.__version__,
        cuda=torch.version.cuda,
        has_gloo=dist.is_available() and dist.is_gloo_available(),
        nccl=_nccl_version(),
        extension=extension,
        gpus=tuple(_find_gpu(index, extension) for index in range(torch.cuda.device_count())),
    )


def _nccl_version() -> str | None:
    import torch
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _find_extension() -> Extension:
    exists = importlib.util.find_spec("megatron_gkd._C") is not None
    if not exists:
        return Extension(exists=False)
    try:
        from megatron_gkd.ops import passes

        kernels = passes.import_kernels()
    except Exception as error:  # whatever a library of another build raises
        return Extension(exists=True, problem=f"{type(error).__name__}: {error}".splitlines()[0])
    return Extension(True, None, kernels.cpu_capability(), bool(kernels.has_cuda))


def _find_gpu(index: int, extension: Extension) -> Gpu:
    """Describe a GPU, after the compiled kernels have run on it."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    problem = None
    if extension.has_cuda:
        try:
            _run_kernels(index)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    return Gpu(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}", problem)


def _run_kernels(index: int) -> None:
    import torch

    from megatron_gkd.ops import DivergenceSpec, vocab_parallel_divergence

    logits = torch.zeros(2, 64, device=f"cuda:{index}", requires_grad=True)
    vocab_parallel_divergence(logits, torch.ones_like(logits), DivergenceSpec(0.5)).sum().backward()
    torch.cuda.synchronize(index)


if __name__ == "__main__":
    os.environ.setdefault("MEGATRON_GKD_IMPL", "auto")
    print(_MARK + json.dumps(asdict(find_facts())))

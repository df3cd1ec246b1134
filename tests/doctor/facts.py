"""A simulated machine: what torch would report on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_gkd.doctor.processes import Outcome
from megatron_gkd.doctor.subject import Subject
from megatron_gkd.doctor.torch_facts import Extension, Gpu, TorchFacts

KERNELS = Extension(exists=True, instruction_set="avx2")
CPU = TorchFacts("2.13.0", None, True, None, KERNELS)
GPU = Gpu("NVIDIA H100", 80 * 2**30, "9.0")
GPUS = replace(CPU, cuda="13.0", nccl="2.28.9", gpus=(GPU, GPU), extension=replace(KERNELS, has_cuda=True))
BROKEN = Outcome(1, "", "Traceback ...\nImportError: libtorch_cpu.so: undefined symbol: x\n")


def subject(facts: TorchFacts | Outcome = CPU, **changes: Any) -> Subject:
    """Return a subject whose torch reports `facts`."""
    made = Subject(**changes)
    vars(made)["torch"] = facts
    return made


def found(find, *arguments) -> dict[str, tuple[str, str, str]]:
    """Return status, text and remedy of each finding by its name; the names must differ."""
    findings = list(find(*arguments))
    assert len({one.name for one in findings}) == len(findings)
    for one in findings:
        assert one.text and "\n" not in one.text and "\n" not in one.remedy
        assert one.status == "ok" or one.remedy, "what is wrong needs a remedy"
    return {one.name: (one.status, one.text, one.remedy) for one in findings}

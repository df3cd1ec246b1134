"""Libraries that a run can do without: whether they are there, and can be imported."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gkd.doctor.finding import Check, Finding, Status
from megatron_gkd.doctor.processes import Outcome, run_python
from megatron_gkd.doctor.subject import Subject
from megatron_gkd.doctor.versions import RANGES, installed_version

IMPORT_SECONDS = 120.0


@dataclass(frozen=True)
class Library:
    """A library that a run can do without.

    Attributes:
        packages: names of its distributions.
        module: what is imported.
        without: what a run on GPUs does without it.
        install: how to get it.
        is_expected: whether a machine with GPUs should have it.
    """

    packages: tuple[str, ...]
    module: str
    without: str
    install: str
    is_expected: bool = False


LIBRARIES = {
    "transformer engine": Library(
        ("transformer-engine",),
        "transformer_engine.pytorch",
        "layers in plain torch replace it",
        "pip install transformer-engine[pytorch]",
        is_expected=True,
    ),
    "apex": Library(("apex",), "apex", "Transformer Engine's or torch's Adam is used", "see github.com/NVIDIA/apex"),
    "flash-attn": Library(
        ("flash-attn",), "flash_attn", "the other attention kernels are used", "pip install flash-attn"
    ),
    "vllm": Library(RANGES["vllm"].packages, "vllm", "rollout.engine = vllm can't be used", RANGES["vllm"].install),
}


def check_of(name: str) -> Check:
    """Return the check of one of `LIBRARIES`."""
    return Check(name, lambda subject: _find(name, LIBRARIES[name], subject), IMPORT_SECONDS + 20)


def _find(name: str, library: Library, subject: Subject) -> Iterator[Finding]:
    version = installed_version(library.packages)
    needs_it = name == "vllm" and subject.recipe is not None and _samples_with_vllm(subject)
    if version is None:
        has_gpus = not isinstance(subject.torch, Outcome) and bool(subject.torch.gpus)
        status: Status = "failed" if needs_it else "warning" if has_gpus and library.is_expected else "ok"
        yield Finding(name, status, f"not installed: {library.without}", "" if status == "ok" else library.install)
        return
    outcome = run_python(["-c", f"import {library.module}"], IMPORT_SECONDS)
    if outcome.code == 0:
        yield Finding(name, "ok", version)
        return
    text = f"{version}: `import {library.module}` fails: {outcome.problem}"
    yield Finding(
        name,
        "failed" if needs_it else "warning",
        text,
        f"install a build for this torch, or remove it: {library.without}",
    )


def _samples_with_vllm(subject: Subject) -> bool:
    recipe = subject.recipe
    return recipe is not None and recipe.distill.lmbda > 0 and recipe.rollout.engine == "vllm"

"""A self-test: the divergence's gradient over two ranks that share the vocabulary, against one process in fp64."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.doctor.finding import Finding
from megatron_gkd.doctor.processes import Outcome, run_together
from megatron_gkd.doctor.subject import Subject

RANKS = 2
SECONDS = 120.0
TOLERANCE = 1e-4
"""Largest relative error of the gradient in fp32. Right kernels are at 1e-6."""
NAME = "gradient self-test"


@dataclass(frozen=True)
class Errors:
    """Relative errors of one rank against one process in fp64.

    Attributes:
        value: of the divergence of all tokens.
        gradient: of the gradient of this rank's logits.
        implementation: what has computed.
    """

    value: float
    gradient: float
    implementation: str


def find_gradient(subject: Subject) -> Iterator[Finding]:
    """Start two ranks, over NCCL where there are two GPUs and over gloo otherwise, and compare their errors."""
    if isinstance(subject.torch, Outcome):
        return
    backend = "nccl" if len(subject.torch.gpus) >= RANKS and subject.torch.nccl is not None else "gloo"
    with tempfile.TemporaryDirectory(prefix="megatron_gkd_doctor_") as folder:
        command = ("-m", "megatron_gkd.doctor.gradient_rank", str(Path(folder) / "rendezvous"), str(RANKS), backend)
        outcomes = run_together([(*command, str(rank)) for rank in range(RANKS)], SECONDS)
    yield compare(outcomes, backend)


def compare(outcomes: list[Outcome], backend: str) -> Finding:
    """Return the finding of the ranks' outcomes."""
    where = f"{RANKS} ranks over {backend}"
    failed = next((outcome for outcome in outcomes if outcome.code != 0), None)
    if failed is not None:
        remedy = "look into the lines of torch, host name and GPUs; for NCCL, run with NCCL_DEBUG=INFO"
        return Finding(NAME, "failed", f"{where}: {failed.problem}", remedy)
    errors = [Errors(**json.loads(outcome.stdout.splitlines()[-1])) for outcome in outcomes]
    value, gradient = (max(getattr(one, name) for one in errors) for name in ("value", "gradient"))
    text = (
        f"{where}, {errors[0].implementation}: relative error of the divergence {value:.1e}, of its gradient "
        f"{gradient:.1e}; at most {TOLERANCE:.0e} is right"
    )
    if value <= TOLERANCE and gradient <= TOLERANCE:
        return Finding(NAME, "ok", text)
    remedy = "rebuild the kernels (pip install --no-build-isolation -e .), or set MEGATRON_GKD_IMPL=torch and report it"
    return Finding(NAME, "failed", text, remedy)

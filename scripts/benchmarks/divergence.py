"""The divergence of materialised logits: one case, all contestants."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.contestants import CONTESTANTS, Builder
from benchmarks.measure import TrainingWork, Work, compete, relative_error
from benchmarks.timing import Plan, Stopwatch
from megatron_gkd.ops import reference

CHECKED_ROWS = 8


def run_case(case: Case, plan: Plan, stopwatch: Stopwatch) -> dict:
    """Measure one case.

    Returns:
        Its sizes and what `compete` found: times of forward and of forward and backward, memory, the gradient's error
        against the fp64 oracle.
    """
    device = stopwatch.device
    student, teacher = case.inputs(device)
    exact = _exact_gradient(case, student, teacher)

    def error(gradients: tuple[Tensor, ...]) -> float:
        return relative_error(gradients[0][:CHECKED_ROWS], exact)

    def prepare(build: Builder) -> Work:
        loss = build(case, device)
        return TrainingWork(lambda: loss(student, teacher), (student,), error)

    builders = {name: lambda build=build: prepare(build) for name, build in CONTESTANTS.items()}
    sizes = asdict(case) | {"forward_bytes": case.forward_bytes, "total_bytes": case.total_bytes}
    # The gradient is what every contestant has to make; what it takes beyond that is its own.
    return {"case": str(case), **sizes, "result_bytes": case.logits_bytes, **compete(builders, plan, stopwatch)}


def _exact_gradient(case: Case, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the fp64 gradient of the mean divergence by the first CHECKED_ROWS rows."""
    rows = student[:CHECKED_ROWS].detach().double().requires_grad_()
    value = reference.divergence(rows, teacher[:CHECKED_ROWS].double(), beta=case.beta).sum() / case.tokens
    return torch.autograd.grad(value, rows)[0]

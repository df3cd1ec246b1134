"""Each pass of the divergence by itself: the bytes that it moves a second, beside a copy's.

python scripts/benchmarks/kernels.py [--device cpu] [--tokens 8192] [--vocab 151936] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks.cases import BETAS, DTYPES, Case
from benchmarks.environment import describe
from benchmarks.measure import Work, compete
from benchmarks.report import headline, kernel_section
from benchmarks.timing import PLANS, Plan, Stopwatch
from megatron_gkd.config.divergences import FAMILIES
from megatron_gkd.ops import passes
from megatron_gkd.ops.forward import compute_forward
from megatron_gkd.ops.params import ChunkTargets, Logits, TokenResults
from megatron_gkd.ops.spec import DivergenceSpec

K1, K1_MOMENTS, K2, K3 = "K1", "K1 with moments", "K2", "K3"
K1_TRAINING, K3_LABELS = "K1 as in training", "K3 with the cross-entropy"
READS = {K1: 2, K1_MOMENTS: 2, K1_TRAINING: 2, K2: 2, K3: 2, K3_LABELS: 2}  # of one model's logits
WRITES = {K3: 1, K3_LABELS: 1}
TEMPERATURE = 0.9  # not 1, at which the sums of the cross-entropy need no terms of their own


def run_case(case: Case, plan: Plan, stopwatch: Stopwatch) -> dict:
    """Time each pass of the divergence at `case.beta`, and return seconds and the bytes that it moves.

    In training the first pass has moments, and the student's sums at temperature 1 beside those at another.
    """
    student, teacher = (x.detach() for x in case.inputs(stopwatch.device))
    logits = Logits(student, teacher)
    spec = DivergenceSpec(case.beta, TEMPERATURE, case.divergence).on_shard(case.columns)
    ones = torch.ones(case.tokens, device=stopwatch.device)
    column = torch.arange(case.tokens, device=stopwatch.device) % case.columns
    results = TokenResults.empty(student, has_losses=True)
    forward = compute_forward(logits, spec, results, ChunkTargets(ones, column, ones))
    rows, labels, out = forward.divergence_rows(), forward.labels, torch.empty_like(student)

    def statistics(moments: bool, untempered: bool = False) -> Callable[[], object]:
        return lambda: passes.statistics(logits, spec, moments=moments, untempered=untempered)

    steps: dict[str, Callable[[], object]] = {K1: statistics(False)} if spec.needs_sums else {}
    steps |= {K1_MOMENTS: statistics(True), K1_TRAINING: statistics(True, True)}
    if spec.needs_sums:
        steps[K2] = lambda: passes.sums(logits, rows.normalizers, spec)
    steps[K3] = lambda: passes.gradient(out, logits, rows, None, spec)
    steps[K3_LABELS] = lambda: passes.gradient(out, logits, rows, labels, spec)
    found = compete({name: lambda step=step: Work(step) for name, step in steps.items()}, plan, stopwatch)
    read = {name: READS[name] * case.logits_bytes for name in steps}
    moved = {name: read[name] + WRITES.get(name, 0) * case.logits_bytes for name in steps}
    return {"case": str(case), **asdict(case), "moved_bytes": moved, "read_bytes": read, **found}


def default_cases(device: torch.device) -> list[Case]:
    large = Case(8192, 151936) if device.type == "cuda" else Case(64, 151936, dtype="fp32")
    families = ("alpha", "skewed_forward_kl", "skewed_reverse_kl", "total_variation")
    jsd = [replace(large, beta=beta) for beta in (0.5, 0.0, 1.0)]
    return [*jsd, *(replace(large, divergence=family) for family in families)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--divergence", choices=FAMILIES, default="jsd")
    options = parser.parse_args()
    device = torch.device(options.device)
    keys = ("tokens", "vocab", "dtype", "divergence")
    named = {name: value for name in keys if (value := getattr(options, name)) is not None}
    case = replace(default_cases(device)[0], **named)
    stopwatch = Stopwatch(device)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(headline({"environment": describe(device)}))
    for beta in options.betas:
        console.print(kernel_section(run_case(replace(case, beta=beta), PLANS[device.type], stopwatch)).rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())

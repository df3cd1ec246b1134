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
from megatron_gkd.ops import passes
from megatron_gkd.ops.forward import compute_forward
from megatron_gkd.ops.params import DivergenceRows, Logits
from megatron_gkd.ops.spec import DivergenceSpec

K1, K1_MOMENTS, K2, K3 = "K1", "K1 with moments", "K2", "K3"
READS_AND_WRITES = {K1: 2, K1_MOMENTS: 2, K2: 2, K3: 3}  # of one model's logits


def run_case(case: Case, plan: Plan, stopwatch: Stopwatch) -> dict:
    """Time each pass of the divergence at `case.beta`, and return seconds and the bytes that it moves."""
    student, teacher = (x.detach() for x in case.inputs(stopwatch.device))
    logits, spec = Logits(student, teacher), DivergenceSpec(case.beta).on_shard(case.columns)
    forward = compute_forward(logits, spec)
    normalizers, out = forward.normalizers.packed(), torch.empty_like(student)
    rows = DivergenceRows(normalizers, forward.slope_sum, torch.ones_like(forward.slope_sum))

    def statistics(moments: bool) -> Callable[[], object]:
        return lambda: passes.statistics(logits, spec, moments=moments)

    steps: dict[str, Callable[[], object]] = {K1: statistics(False)} if spec.needs_sums else {}
    steps[K1_MOMENTS] = statistics(True)
    if spec.needs_sums:
        steps[K2] = lambda: passes.sums(logits, normalizers, spec)
    steps[K3] = lambda: passes.gradient(out, logits, rows, None, spec)
    found = compete({name: lambda step=step: Work(step) for name, step in steps.items()}, plan, stopwatch)
    moved = {name: READS_AND_WRITES[name] * case.logits_bytes for name in steps}
    return {"case": str(case), **asdict(case), "moved_bytes": moved, **found}


def default_cases(device: torch.device) -> list[Case]:
    large = Case(8192, 151936) if device.type == "cuda" else Case(64, 151936, dtype="fp32")
    return [replace(large, beta=beta) for beta in (0.5, 0.0, 1.0)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--vocab", type=int)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    options = parser.parse_args()
    device = torch.device(options.device)
    named = {name: value for name in ("tokens", "vocab", "dtype") if (value := getattr(options, name)) is not None}
    case = replace(default_cases(device)[0], **named)
    stopwatch = Stopwatch(device)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(headline({"environment": describe(device)}))
    for beta in options.betas:
        console.print(kernel_section(run_case(replace(case, beta=beta), PLANS[device.type], stopwatch)).rich())
    return 0


if __name__ == "__main__":
    sys.exit(main())

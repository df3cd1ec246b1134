"""Measure the loss over a local teacher's top-k beside that over all tokens, forward and backward, in one run.

    python scripts/benchmarks/topk.py                                # both tail modes, k 64, fp32 and bf16
    python scripts/benchmarks/topk.py --tokens 64 --vocab 32000 --k 8 64 512 --dtypes bf16

Contestants: the divergence of the teacher's logits (dense), and the choice of the top-k from them with the divergence
over it (renormalize, bucket). They run in turn; a contestant's ratio is the median of its times over those of the dense
one in the same turn. On a CPU a time is this process's user time, which other processes disturb little, on a GPU that
between two events. Prints a table, and writes it with all samples (JSON, Markdown) into --output after each case.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.environment import describe, file_stem
from benchmarks.report import Section, headline
from megatron_gkd.ops import (
    DivergenceSpec,
    implementation,
    topk_divergence,
    vocab_parallel_divergence,
    vocab_parallel_topk,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DENSE = "dense"
GOAL = 1.5  # times the dense divergence, with the bucket and k = 64


def main() -> int:
    options = parse()
    device = torch.device(options.device)
    run = {"environment": describe(device), "implementation": implementation(device), "cases": []}
    for dtype in options.dtypes:
        for beta in options.betas:
            for k in options.k:
                run["cases"].append(measure(options, dtype, beta, k, device))
                path = save(run, options.output)
    Console(width=None if sys.stdout.isatty() else 160).print(section(run).rich())
    print(f"Goal: bucket with k 64 at most {GOAL} x {DENSE}. Written to {path}")
    return 0


def section(run: dict) -> Section:
    """Return the table of a run."""
    rows = [
        (case["case"], name, f"{1e3 * median(case['seconds'][name]):.0f}", f"{ratio:.2f}")
        for case in run["cases"]
        for name, ratio in case["ratios"].items()
    ]
    return Section("Top-k with a local teacher, forward and backward", ("case", "loss", "ms", f"× {DENSE}"), rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--betas", type=float, nargs="+", default=[0.5])
    parser.add_argument("--k", type=int, nargs="+", default=[64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    return parser.parse_args()


def measure(options: argparse.Namespace, dtype: str, beta: float, k: int, device: torch.device) -> dict:
    """Return times of all contestants and their ratios, after one turn that does not count."""
    contestants = dict(build(options, DTYPES[dtype], beta, k, device))
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(options.repeats + 1):
        for name, step in contestants.items():
            spent = time_of(step, device)
            if turn:
                seconds[name].append(spent)
    ratios = {
        name: median(a / b for a, b in zip(times, seconds[DENSE], strict=True)) for name, times in seconds.items()
    }
    case = f"{options.tokens} x {options.vocab} {dtype} beta {beta:g} k {k}"
    return {"case": case, "k": k, "beta": beta, "dtype": dtype, "seconds": seconds, "ratios": ratios}


def build(
    options: argparse.Namespace, dtype: torch.dtype, beta: float, k: int, device: torch.device
) -> Iterator[tuple[str, Callable[[], None]]]:
    generator = torch.Generator(device).manual_seed(0)
    shape = options.tokens, options.vocab
    student = (3 * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_()
    teacher = (student.detach() + torch.randn(shape, generator=generator, device=device)).to(dtype)
    spec = DivergenceSpec(beta)

    def step(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            student.grad = None
            loss().sum().backward()

        return run

    yield DENSE, step(lambda: vocab_parallel_divergence(student, teacher, spec))
    yield "renormalize", step(lambda: topk_divergence(student, vocab_parallel_topk(teacher, k, temperature=None), spec))
    yield (
        "bucket",
        step(lambda: topk_divergence(student, vocab_parallel_topk(teacher, k), spec, tail_mode="bucket")),
    )


def time_of(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - before


def save(run: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem('topk', run['environment'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    path.with_suffix(".md").write_text(f"## {headline(run)}\n\n{section(run).markdown()}")
    return path


if __name__ == "__main__":
    sys.exit(main())

"""Measure the loss beside eager torch, torch.compile, Liger Kernel, TRL and ms-swift.

Its passes are measured beside a copy, the fused head beside its matrix products; all in one run.

    python scripts/benchmarks/loss.py                        # a few minutes at most: what suits the device
    python scripts/benchmarks/loss.py --full                 # every combination of size, type and beta
    python scripts/benchmarks/loss.py --tokens 512 --vocab 151936 --dtypes fp32 --betas 0.5

Prints tables and writes them with all samples as JSON, Markdown and a picture into --output. Peers that aren't
installed are listed with the command that installs them; no dependencies of theirs are needed:

    pip install --no-deps --target peers liger-kernel trl ms-swift && PYTHONPATH=peers python scripts/benchmarks/loss.py

MEGATRON_GKD_IMPL=torch|compiled|auto chooses our implementation.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from rich.console import Console

from benchmarks import cases, divergence, head, kernels
from benchmarks.environment import describe, file_stem
from benchmarks.picture import draw
from benchmarks.report import NOTES, headline, markdown, sections
from benchmarks.timing import PLANS, Plan, Stopwatch

RUNNERS = {"divergence": divergence, "kernels": kernels, "head": head}


def main() -> int:
    options = parse()
    device = torch.device(options.device)
    plan = PLANS[device.type]
    if options.repeats:
        plan = Plan(options.repeats, options.repeats, plan.seconds)
    stopwatch = Stopwatch(device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    run = {"environment": describe(device)}
    console.print(headline(run))
    parts = {"divergence": chosen_cases(options, device)}
    if not options.divergence_only:
        parts |= {"kernels": kernels.default_cases(device), "head": head.default_cases(device)}
    for part, its_cases in parts.items():
        run[part] = []
        for case in its_cases:
            console.print(f"[dim]{part}: {case} …")
            run[part].append(RUNNERS[part].run_case(case, plan, stopwatch))
            save(run, options.output)  # whatever becomes of later cases
    for section in sections(run):
        console.print(section.rich())
    console.print(NOTES)
    path = save(run, options.output)
    path.with_suffix(".md").write_text(markdown(run))
    draw(run, path.with_suffix(".png"))
    console.print(f"Written to {options.output}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--vocab", type=int, nargs="+")
    parser.add_argument("--tp", type=int, nargs="+", help="measure the columns of one of so many shards")
    parser.add_argument("--dtypes", choices=cases.DTYPES, nargs="+")
    parser.add_argument("--betas", type=float, nargs="+")
    parser.add_argument("--full", action="store_true", help="every combination; hours on a CPU")
    parser.add_argument("--divergence-only", action="store_true", help="leave out single kernels and the fused head")
    parser.add_argument("--repeats", type=int, help="exactly so many repetitions of everything")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"))
    return parser.parse_args()


def chosen_cases(options: argparse.Namespace, device: torch.device) -> list[cases.Case]:
    """Return the default cases, the full grid, or the combinations of the options.

    Values that no option names are those of the first default case.
    """
    if options.full:
        return cases.full_grid()
    defaults = cases.default_cases(device)
    first = defaults[0]
    named = (options.tokens, options.vocab, options.tp, options.dtypes, options.betas)
    if not any(named):
        return defaults
    fallback = ([first.tokens], [first.vocab], [first.tp], [first.dtype], [cases.Case.beta])
    return list(cases.grid(*(values or other for values, other in zip(named, fallback, strict=True))))


def save(run: dict, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_stem('loss', run['environment'])}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(main())

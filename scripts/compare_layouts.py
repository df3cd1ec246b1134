"""Run one recipe under several layouts and compare loss and gradient norm at every step.

    python scripts/compare_layouts.py recipe.yaml "" TP2 PP2 CP2 TP2xPP2xCP2
    python scripts/compare_layouts.py moe_recipe.yaml "" EP2 TP2xEP2

A layout names its sizes (TP, PP, CP, EP, VPP, DP); "" is one process. All others are compared with the first. Runs in
fp32, on as many local processes as each layout needs; exits with 1 where a relative difference exceeds the tolerance.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

KEYS = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "CP": "context_parallel_size",
    "EP": "expert_model_parallel_size",
    "VPP": "virtual_pipeline_model_parallel_size",
}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("recipe", type=Path)
    arguments.add_argument("layouts", nargs="+")
    arguments.add_argument("--train_iters", type=int, default=5)
    arguments.add_argument("--tolerance", type=float, default=1e-4)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            layout: run(options.recipe, layout, options.train_iters, Path(folder) / (layout or "one"))
            for layout in options.layouts
        }
    first = runs[options.layouts[0]]
    table = Table(title=f"{options.recipe}: largest relative difference over {options.train_iters} steps")
    for column in ("layout", "processes", "last loss", "loss", "grad_norm"):
        table.add_column(column, justify="left" if column == "layout" else "right")
    failed = False
    for layout, records in runs.items():
        differences = {key: largest_difference(records, first, key) for key in ("loss", "grad_norm")}
        failed |= not all(difference <= options.tolerance for difference in differences.values())
        shown = (f"{difference:.1e}" for difference in differences.values())
        table.add_row(layout or "one process", str(processes(layout)), f"{records[-1]['loss']:.6f}", *shown)
    Console().print(table)
    return int(failed)


def sizes(layout: str) -> dict[str, int]:
    """Return the sizes in a name: `TP2xPP2` gives {"TP": 2, "PP": 2}."""
    found = dict(re.findall(r"(VPP|TP|PP|CP|EP|DP)(\d+)", layout))
    if "x".join(f"{name}{size}" for name, size in found.items()) != layout:
        sys.exit(f"layout {layout!r}: write sizes of TP, PP, VPP, CP, EP or DP joined by x, as in TP2xPP2")
    return {name: int(size) for name, size in found.items()}


def processes(layout: str) -> int:
    """Return the number of processes. Experts are spread over data-parallel ranks, so EP alone needs as many."""
    size = sizes(layout)
    model = math.prod(size.get(name, 1) for name in ("TP", "PP", "CP"))
    experts = size.get("EP", 1) * size.get("PP", 1)
    return math.lcm(model * size.get("DP", 1), experts)


def run(recipe: Path, layout: str, train_iters: int, output_dir: Path) -> list[dict]:
    """Run the recipe under the layout and return its training records."""
    size = sizes(layout)
    # Every size, so that those of the recipe don't count; sequence parallelism wherever there is tensor parallelism.
    keys = {key: size.get(name, 1) for name, key in KEYS.items() if name != "VPP"}
    keys |= {KEYS["VPP"]: size.get("VPP", "null"), "sequence_parallel": "true", "dtype": "fp32"}
    keys |= {"train_iters": train_iters, "output_dir": output_dir, "save_interval": "null", "tensorboard": "false"}
    overrides = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(processes(layout)),
    ]
    command = [*torchrun, "-m", "megatron_gkd", "train", str(recipe), *overrides]
    print(f"{layout or 'one process'} …", file=sys.stderr, flush=True)
    finished = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{finished.stderr[-4000:]}")
    lines = (output_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "split" not in record]


def largest_difference(records: list[dict], reference: list[dict], key: str) -> float:
    pairs = zip(records, reference, strict=True)
    return max(abs(found[key] - expected[key]) / max(abs(expected[key]), 1e-30) for found, expected in pairs)


if __name__ == "__main__":
    sys.exit(main())

"""The planner's estimate of strong and weak scaling to 1024 GPUs; see ``scaling.py --plan``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

if not __package__:  # run by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.report import Section
from megatron_gkd.config.commands import PLANS
from megatron_gkd.config.load import load
from megatron_gkd.planning.cluster import GB, GIB, Assumptions, Cluster
from megatron_gkd.planning.devices import find_device
from megatron_gkd.planning.plan import Plan
from megatron_gkd.planning.run import PlanRequest, run_plan

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path("scripts/planning/qwen3_32b_to_8b.yaml")
GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
STRONG_ROWS, WEAK_ROWS = 1024, 8
COLUMNS = ("GPUs", "rows", "s a step", "tokens a second and GPU", "of 8 GPUs", "share of peak", "GiB of a GPU")


def plan_on(gpus: int, rows: int, recipe: Path = RECIPE) -> Plan:
    """Return the plan of a recipe on `gpus` H100 in nodes of 8, with `rows` in a step."""
    os.chdir(ROOT)  # where the recipe's paths begin
    device = find_device("h100")
    cluster = Cluster(gpus, 8, device, int(device.memory_gb * GB))
    loaded = load(recipe, ["--global_batch_size", str(rows)], world_size=gpus, command=PLANS)
    return run_plan(PlanRequest(str(recipe), loaded, cluster, Assumptions()), is_shown=False).plan


def sections(counts: tuple[int, ...] = GPUS) -> Iterator[Section]:
    """Plan and return the tables of strong and of weak scaling."""
    yield Section(f"Planned, {STRONG_ROWS} rows a step", COLUMNS, _rows({gpus: STRONG_ROWS for gpus in counts}))
    yield Section(f"Planned, {WEAK_ROWS} rows a GPU", COLUMNS, _rows({gpus: WEAK_ROWS * gpus for gpus in counts}))


def _rows(rows_of: dict[int, int]) -> list[list[str]]:
    table, first = [], None
    for gpus, rows in rows_of.items():
        plan = plan_on(gpus, rows)
        rate = plan.time.tokens_per_second / gpus
        first = first or rate
        table.append(
            [
                str(gpus),
                str(rows),
                f"{plan.time.mean:.3g}",
                f"{rate:.0f}",
                f"{rate / first:.0%}",
                f"{plan.time.flops_utilization:.0%}",
                f"{plan.peak / GIB:.1f}" + ("" if plan.fits else " (too much)"),
            ]
        )
    return table


def write(output: Path, tables: list[Section]) -> str:
    """Write the tables as Markdown, and return it."""
    output.mkdir(parents=True, exist_ok=True)
    text = f"## {RECIPE}, H100 SXM in nodes of 8\n\n" + "\n".join(table.markdown() for table in tables)
    (output / "planned_scaling.md").write_text(text)
    return text


if __name__ == "__main__":
    print(write(Path(sys.argv[1]), list(sections())))

"""Write the tables of docs/planning.md: python scripts/write_planning_tables.py [--check] [--suggest] [NAME ...].

Each recipe in scripts/planning/ is planned on the GPUs of its case, from the config.json in scripts/planning/models/.
The tables go to scripts/planning/results/NAME.md; `scripts/write_docs_tables.py` copies them into the page. With
--suggest the layouts that `megatron-gkd plan --suggest` finds are written to NAME_suggestions.md, too, which takes
minutes. With --check nothing is written, and the exit status is 1 where a file differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_gkd.config.commands import PLANS
from megatron_gkd.config.load import load
from megatron_gkd.planning.cluster import GB, Assumptions, Cluster
from megatron_gkd.planning.devices import find_device
from megatron_gkd.planning.plan import Plan
from megatron_gkd.planning.report import links_table, memory_table, step_lines, time_table, verdict
from megatron_gkd.planning.run import PlanRequest, PlanResult, run_plan
from megatron_gkd.planning.suggestion_report import suggestion_blocks
from megatron_gkd.planning.tables import Paragraph, Table

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "scripts/planning"


@dataclass(frozen=True)
class Case:
    """A recipe on a number of GPUs."""

    name: str
    title: str
    gpus: int


CASES = {
    case.name: case
    for case in (
        Case("qwen3_235b_to_30b", "Qwen3-235B-A22B → Qwen3-30B-A3B, 512 H100", 512),
        Case("qwen3_32b_to_8b", "Qwen3-32B → Qwen3-8B, 8 H100", 8),
        Case("qwen3_32b_to_1_7b_on_policy", "Qwen3-32B → Qwen3-1.7B on-policy with vLLM, 8 H100", 8),
    )
}


def plan_case(case: Case, suggestions: int = 0) -> PlanResult:
    """Return the plan of a case, from the repository's root, where its recipe's paths begin."""
    os.chdir(ROOT)
    path = FOLDER / f"{case.name}.yaml"
    device = find_device("h100")
    cluster = Cluster(case.gpus, 8, device, int(device.memory_gb * GB))
    recipe = load(path, world_size=case.gpus, command=PLANS)
    return run_plan(PlanRequest(str(path), recipe, cluster, Assumptions(), suggestions=suggestions), is_shown=False)


def page(case: Case, plan: Plan) -> str:
    """Return the tables of a plan as Markdown."""
    parts = [f"# {case.title}\n"]
    for heading, table in _tables(plan):
        parts.append(f"## {heading}\n\n{table.markdown()}")
    return "\n".join(parts)


def _tables(plan: Plan) -> Iterator[tuple[str, Table]]:
    yield "Memory", memory_table(plan)
    yield "Communication", links_table(plan)
    yield "Time", time_table(plan)
    lines = [*step_lines(plan), ("memory", " ".join(verdict(plan)))]
    yield "Step", Table("", ("", "estimate"), tuple(lines), text_columns=2)


def suggestions_page(case: Case, result: PlanResult) -> str:
    """Return the suggested layouts as Markdown."""
    assert result.sweep is not None
    parts = [f"# {case.title}: layouts\n"]
    for block in suggestion_blocks(result.plan.recipe, result.sweep, result.plan):
        parts.append(block.markdown() if isinstance(block, Table) else f"```\n{block.plain()}\n```\n")
        assert isinstance(block, Table | Paragraph)
    return "\n".join(parts)


def main() -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--suggest", action="store_true")
    options = parser.parse_args()
    differing = 0
    for name in options.names:
        result = plan_case(CASES[name], 5 if options.suggest else 0)
        pages = {name: page(CASES[name], result.plan)}
        if options.suggest:
            pages[f"{name}_suggestions"] = suggestions_page(CASES[name], result)
        for stem, text in pages.items():
            path = FOLDER / "results" / f"{stem}.md"
            if path.exists() and path.read_text(encoding="utf-8") == text:
                continue
            differing += 1
            print(f"{path.relative_to(ROOT)}: {'differs from the plan' if options.check else 'written'}")
            if not options.check:
                path.write_text(text, encoding="utf-8")
    return int(bool(differing) and options.check)


if __name__ == "__main__":
    sys.exit(main())

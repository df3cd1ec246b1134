"""Compare every family of models with transformers under every layout: python scripts/write_model_table.py [case ...].

Writes the errors into docs/model_table.json and the tables into docs/models.md. Cases that are not named keep their
rows; `text` and `images` name all of theirs, and `--render` writes the tables alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
PAGE, RESULTS = ROOT / "docs/models.md", ROOT / "docs/model_table.json"
SUITES = {"text": "families.text", "images": "families.vision"}
LAYOUTS = ("TP1", "TP2", "TP2+SP", "PP2", "CP2", "EP2", "TP2+SP+EP2")
LIBRARIES = ("mcore-bridge", "megatron-core", "transformers", "torch")
MARKER = re.compile(r"<!-- models: (?P<suite>\w+) -->\n.*?<!-- end of models -->", re.DOTALL)
OK = 1e-5
"""Logits within this of the largest logit and gradients within ten times this of their largest entry are `ok`."""


def main() -> int:
    """Measure the cases that the arguments name, all without arguments; return the exit status."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    if sys.argv[1:] != ["--render"]:
        for suite, module in SUITES.items():
            _measure_suite(results.setdefault(suite, {}), suite, module, sys.argv[1:])
        results["versions"] = {name: importlib.metadata.version(name) for name in LIBRARIES}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0


def render(page: str, results: dict[str, Any]) -> str:
    """Return the page with its tables as the results have them."""

    def table(found: re.Match[str]) -> str:
        suite = found["suite"]
        lines = _refused() if suite == "refused" else _table(results.get(suite, {}))
        return f"<!-- models: {suite} -->\n{lines}<!-- end of models -->"

    return MARKER.sub(table, page)


def _measure_suite(rows: dict[str, Any], suite: str, module: str, chosen: list[str]) -> None:
    from world import World

    cases = importlib.import_module(module)
    worlds = {1: World(1), 2: World(2)}
    try:
        for case in cases.CASES:
            if chosen and suite not in chosen and case.name not in chosen:
                continue
            started = time.monotonic()
            path, expected = cases.reference(case)
            rows[case.name] = {
                layout: _measure(cases, worlds[1 if layout == "TP1" else 2], path, expected, layout)
                for layout in ("TP1", *case.layouts)
            }
            print(f"{case.name}: {json.dumps(rows[case.name])} ({time.monotonic() - started:.0f} s)", flush=True)
    finally:
        for world in worlds.values():
            world.close()
    ordered = {case.name: rows[case.name] for case in cases.CASES if case.name in rows}
    rows.clear()
    rows.update(ordered)


def _measure(cases: Any, world: Any, path: Path, expected: Any, layout: str) -> dict[str, Any]:
    from families.case import errors_of

    try:
        errors = errors_of(world.run(cases.measure, path, expected, layout))
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return {"logits": errors.logits, "gradient": errors.gradient, "worst": errors.worst, "export": errors.export} | (
        {"rollout": errors.rollout} if errors.rollout else {}
    )


def _table(rows: dict[str, Any]) -> str:
    header = ["model", "architecture", *LAYOUTS, "export", "rollout", "needs"]
    lines = [header, ["---"] * len(header)]
    for name, layouts in rows.items():
        family = _family(name)
        cells = [_cell(layouts[layout]) if layout in layouts else "" for layout in LAYOUTS]
        exports = {result.get("export", "not run") for result in layouts.values()}
        export = "exact" if exports == {""} else "joined experts" if "experts" in max(exports) else max(exports)
        rollout = layouts["TP1"].get("rollout", "")
        lines.append([f"`{name}`", f"`{family.architectures[-1]}`", *cells, export, rollout, family.needs])
    columns = [column for column in zip(*lines, strict=True) if any(column[2:])]
    return "".join(f"| {' | '.join(line)} |\n" for line in zip(*columns, strict=True))


def _refused() -> str:
    from megatron_gkd.checkpoint_format.families.refused import REFUSED

    lines = ["| architecture | why |", "| --- | --- |", *(f"| `{name}` | {why} |" for name, why in REFUSED.items())]
    return "".join(f"{line}\n" for line in lines)


def _cell(result: dict[str, Any]) -> str:
    if "error" in result:
        return "error"
    if result["logits"] <= OK and result["gradient"] <= 10 * OK:
        return "ok"
    return f"**{result['logits']:.0e} / {result['gradient']:.0e}**"


def _family(case: str) -> Any:
    """Return the family whose model_type a case's name begins with, the longest one."""
    from megatron_gkd.checkpoint_format.families import FAMILIES

    return FAMILIES[max((name for name in FAMILIES if case.startswith(name)), key=len)]


if __name__ == "__main__":
    sys.exit(main())

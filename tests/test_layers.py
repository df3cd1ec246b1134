"""Each layer of the package imports only from those below it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_gkd

ROOT = Path(megatron_gkd.__file__).parent
LAYERS = [
    ("errors",),
    ("checkpoint_format",),
    ("config",),
    ("runtime",),
    ("reporting", "launch", "migration"),
    ("data",),
    ("ops",),
    ("models",),
    ("teachers", "rollout"),
    ("training",),
    ("planning",),
    ("doctor",),
    ("commands",),
    ("cli",),
    ("__main__",),
]
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports_of(path: Path) -> set[str]:
    """Return the parts of the package that a file imports from."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "megatron_gkd":
            modules += [f"megatron_gkd.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
    return {module.split(".")[1] for module in modules if module.startswith("megatron_gkd.")}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_a_layer():
    assert {part_of(path) for path in ROOT.rglob("*.py")} - {"__init__"} == LEVELS.keys()


@pytest.mark.parametrize("part", LEVELS)
def test_no_part_imports_from_above_or_beside(part):
    for path in [ROOT / f"{part}.py", *(ROOT / part).rglob("*.py")]:
        if path.exists():
            imported = imports_of(path) & LEVELS.keys() - {part}
            assert all(LEVELS[other] < LEVELS[part] for other in imported), (path, imported)


def test_the_ops_import_only_torch_and_numpy():
    """As other packages may be absent where ``scripts/gpu_check.sh`` tests and measures them."""
    script = (
        "import sys; import megatron_gkd.ops; "
        "print(sorted({'pydantic', 'yaml', 'rich', 'transformers', 'megatron.core', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"

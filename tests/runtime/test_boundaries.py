"""Only the listed modules use Megatron's global state, mcore-bridge and CUDA, and all prepare Megatron's import."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_gkd

ROOT = Path(megatron_gkd.__file__).parent
PATTERNS = {
    "parallel_state": {
        "runtime/mesh.py",
        "runtime/transformer_engine/attention.py",
        "runtime/transformer_engine/grouped_linear.py",
        "runtime/transformer_engine/linear.py",
    },
    "mcore_bridge": {
        "models/build_options.py",
        "models/lora/factors.py",
        "models/lora/injection.py",
        "models/lora/reading.py",
        "models/megatron_model.py",
        "models/repairs/__init__.py",
        "models/repairs/delta_net.py",
        "models/repairs/gate_up.py",
        "models/repairs/norm_replicas.py",
        "runtime/gated_delta_rule.py",
        "runtime/mesh.py",
        "runtime/preload.py",
    },
    "torch.cuda": {
        "doctor/torch_facts.py",
        "models/host_rows.py",
        "models/offload.py",
        "rollout/vllm/isolation.py",
        "rollout/vllm/transfer_groups.py",
        "runtime/cpu_patches.py",
        "runtime/portability.py",
    },
}


def _names(path: Path) -> set[str]:
    """Return all names, dotted ones whole, that the code in a file uses; comments and strings do not count."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute):
            names.add(ast.unparse(node))
    return names


@pytest.mark.parametrize("name", PATTERNS)
def test_only_these_modules_use(name):
    use = re.compile(rf"(^|\.){re.escape(name)}($|\.)")
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if any(map(use.search, _names(path)))}
    assert found == PATTERNS[name]


def _path(module: str) -> Path | None:
    path = ROOT.parent / module.replace(".", "/")
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return file
    return None


@functools.cache
def _imports(path: Path) -> list[str]:
    """Return the modules that a file imports at its top level, in order."""
    modules: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def _first_of_megatron(module: str, visited: set[str]) -> str | None:
    """Follow the imports of a module; return the first module that imports Megatron, or runtime.preload before any."""
    parts = module.split(".")
    for name in (".".join(parts[:count]) for count in range(1, len(parts) + 1)):
        path = _path(name)
        if name in visited or path is None:
            continue
        visited.add(name)
        if name == "megatron_gkd.runtime.preload":
            return name
        for other in _imports(path):
            if other.split(".")[0] in ("megatron", "mcore_bridge"):
                return name
            if other.startswith("megatron_gkd") and (found := _first_of_megatron(other, visited)):
                return found
    return None


def test_every_module_prepares_the_import_of_megatron():
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if parts[:2] == ("megatron_gkd", "runtime") and ("transformer_engine" in parts or parts[-1] == "preload"):
            continue  # imported by runtime.preload
        module = ".".join(part for part in parts if part != "__init__")
        assert _first_of_megatron(module, set()) in (None, "megatron_gkd.runtime.preload"), module


def test_triton_is_not_needed():
    code = "import sys; sys.modules['triton'] = None; import megatron_gkd.models.megatron_model"
    path = os.pathsep.join([str(ROOT.parent), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})

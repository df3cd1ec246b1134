"""Functions of other packages, taken at run time out of their installed files.

Only chosen definitions of a file are executed, with its imports of torch and of the standard library. So the package
may be installed without its dependencies, which are many:

    pip install --no-deps --target peers ms-swift trl liger-kernel && PYTHONPATH=peers python ...
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from types import SimpleNamespace
from typing import Any

EXECUTED_IMPORTS = {"torch", *sys.stdlib_module_names}


class Unavailable(Exception):
    """A peer that can't run here: the reason, and the command that installs it (or "")."""

    def __init__(self, reason: str, install: str = "") -> None:
        super().__init__(reason)
        self.reason, self.install = reason, install


def installed(name: str, sites: Sequence[str] | None = None) -> metadata.Distribution:
    """Return the package `name` as found in the folders `sites` (default: sys.path).

    Raises:
        Unavailable: there is none.
    """
    found = next(iter(metadata.distributions(name=name, **({} if sites is None else {"path": list(sites)}))), None)
    if found is None:
        raise Unavailable("not installed", f"pip install --no-deps {name}")
    return found


def definitions(package: metadata.Distribution, path: str, *names: str, **provided: Any) -> SimpleNamespace:
    """Return the definitions called `names` in the package's file `path`, in a namespace that also holds `provided`.

    A name is that of a function, a class or a variable at the top level, or `Class.method` for a static method, which
    is then called `method`. No names: everything but the other imports. Unavailable where this version of the package
    doesn't have the file or a name.
    """
    label = f"{package.metadata['Name']} {package.version}"
    try:
        body = ast.parse(package.locate_file(path).read_text()).body
    except FileNotFoundError:
        raise Unavailable(f"{label} has no {path}") from None
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    chosen = [node for name in names for node in _named(body, name)] if names else [x for x in body if x not in imports]
    namespace = {"__name__": __name__, **provided}
    statements = [*filter(_is_executed, imports), *chosen]
    exec(compile(ast.Module(statements, type_ignores=[]), path, "exec"), namespace)
    missing = [name for name in names if name.rpartition(".")[2] not in namespace]
    if missing:
        raise Unavailable(f"{label} has no {', '.join(missing)} in {path}")
    return SimpleNamespace(**namespace)


def _is_executed(node: ast.Import | ast.ImportFrom) -> bool:
    """Return whether all that the statement imports is torch's or the standard library's."""
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return not getattr(node, "level", 0) and all(module.split(".")[0] in EXECUTED_IMPORTS for module in modules)


def _named(body: list[ast.stmt], name: str) -> Iterator[ast.stmt]:
    outer, _, method = name.partition(".")
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == outer:
            yield from _static_method(node, method) if method else [node]
        elif isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id == outer for x in node.targets):
            yield node


def _static_method(node: ast.ClassDef, name: str) -> Iterator[ast.stmt]:
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name == name:
            method.decorator_list = []
            yield method

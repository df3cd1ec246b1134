"""Read a configuration of NeMo-RL: the files that it is based on, overrides, and references between its values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_gkd.config import yaml_text
from megatron_gkd.migration.source import read_settings

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_MAX_DEPTH = 20


def read_nemo_config(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], list[str]]:
    """Return a configuration with its references replaced by values.

    Args:
        path: the YAML file.
        overrides: `a.b=value`, as Hydra takes them.

    Returns:
        The configuration, and the files that it is based on but that are missing.

    Raises:
        UserError: a file can't be read.
    """
    missing: list[str] = []
    tree = _read(path, missing)
    for text in overrides:
        name, _, value = text.lstrip("+~").partition("=")
        _set(tree, name.split("."), yaml_text.parse(value))
    return _resolve(tree, tree, ()), missing


def _read(path: Path, missing: list[str], depth: int = 0) -> dict[str, Any]:
    tree = read_settings(path)
    bases = tree.pop("defaults", [])
    found: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases or []:
        file = path.parent / str(base)
        if file.is_file() and depth < _MAX_DEPTH:
            found = _merge(found, _read(file, missing, depth + 1))
        else:
            missing.append(str(base))
    return _merge(found, tree)


def _merge(base: Any, other: Any) -> Any:
    """Return `base` with the values of `other`, mapping by mapping."""
    if not isinstance(base, dict) or not isinstance(other, dict):
        return other
    return base | {key: _merge(base.get(key), value) for key, value in other.items()}


def _set(tree: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        child = tree.get(name)
        if not isinstance(child, dict):
            child = tree[name] = {}
        tree = child
    tree[names[-1]] = value


def _resolve(value: Any, root: dict[str, Any], place: tuple[str, ...], depth: int = 0) -> Any:
    """Return a value with the references inside replaced; those to nothing stay as they are."""
    if isinstance(value, dict):
        return {key: _resolve(one, root, (*place, str(key)), depth) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolve(one, root, (*place, ""), depth) for one in value]
    while isinstance(value, str) and depth < _MAX_DEPTH and (found := _REFERENCE.search(value)):
        depth += 1
        referred = _refer(found[1].strip(), root, place)
        if referred is None:
            return value
        if found[0] == value:
            return _resolve(referred, root, place, depth)
        value = value.replace(found[0], str(_resolve(referred, root, place, depth)))
    return value


def _refer(text: str, root: dict[str, Any], place: tuple[str, ...]) -> Any:
    """Return what a reference stands for, `a.b`, `..b` (from its place) or `mul:2, 3`; None for anything else."""
    name, colon, arguments = text.partition(":")
    if colon:
        values = [yaml_text.parse(one) for one in arguments.split(",")]
        if name != "mul" or len(values) != 2 or not all(isinstance(value, int | float) for value in values):
            return None
        return values[0] * values[1]
    dots = len(text) - len(text.lstrip("."))
    names = [*place[: len(place) - dots], *text.lstrip(".").split(".")] if dots else text.split(".")
    found: Any = root
    for one in names:
        if not isinstance(found, dict) or one not in found:
            return None
        found = found[one]
    return found

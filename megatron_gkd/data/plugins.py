"""Row preprocessors that a user's own Python file registers, by a name or for a data set.

A plugin file holds, for example::

    from megatron_gkd.data import register_preprocessor

    @register_preprocessor("question_answer")
    def question_answer(row):
        return {"prompt": row["question"], "response": row["answer"]}


    @register_dataset("owner/name")
    def owner_name(row):
        return {"prompt": row["task"], "response": row["result"]}
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_gkd.config.dataset_names import DatasetName
from megatron_gkd.errors import UserError

Row = dict[str, Any]
Preprocessor = Callable[[Row], Row | None]


@dataclass(frozen=True)
class RegisteredDataset:
    """A data set that a plugin knows.

    Attributes:
        name: as `data.dataset` may name it, without `#n`.
        preprocessor: of its rows.
        columns: new names of its rows' keys, which the preprocessor reads; None: those of `data.columns`.
    """

    name: str
    preprocessor: Preprocessor
    columns: Mapping[str, str] | None = None


_preprocessors: dict[str, Preprocessor] = {}
_datasets: dict[str, RegisteredDataset] = {}


def register_preprocessor(name: str) -> Callable[[Preprocessor], Preprocessor]:
    """Return a decorator that registers a preprocessor, a function from row to row, as `name`.

    A row for which it returns None is dropped.

    Raises:
        UserError: another function already has that name.
    """

    def register(function: Preprocessor) -> Preprocessor:
        if name in _preprocessors:
            raise UserError(f"two preprocessors are registered as {name!r}; each name may be used once")
        _preprocessors[name] = function
        return function

    return register


def register_dataset(name: str, *, columns: Mapping[str, str] | None = None) -> Callable[[Preprocessor], Preprocessor]:
    """Return a decorator that registers a preprocessor for the rows of one data set.

    It is used where an entry of the recipe has this name and no `preprocessor` of its own, in place of
    `data.preprocessor`. A row for which it returns None is dropped.

    Args:
        name: a hub id, for all of its subsets and splits or with `:subset:split` for one; or a path, pattern or URL.
        columns: new names of the rows' keys; the entry's own replace them.

    Raises:
        UserError: another function is registered for this data set.
    """

    def register(function: Preprocessor) -> Preprocessor:
        if name in _datasets:
            raise UserError(f"two preprocessors are registered for the data set {name!r}; each may have one")
        _datasets[name] = RegisteredDataset(name, function, columns)
        return function

    return register


def find_dataset(name: DatasetName | str) -> RegisteredDataset | None:
    """Return what is registered for a data set: under its whole name, or that without subset and split."""
    if isinstance(name, str):
        return _datasets.get(name)
    for text in (name.text, name.location):
        if text in _datasets:
            return _datasets[text]
    if name.kind != "path":
        return None
    path = Path(name.location).resolve()
    return next((one for key, one in _datasets.items() if Path(key).expanduser().resolve() == path), None)


def find_preprocessor(name: str) -> Preprocessor:
    """Return the preprocessor of that name.

    Raises:
        UserError: there is none; the message has the names that exist.
    """
    if name in _preprocessors:
        return _preprocessors[name]
    near = get_close_matches(name, _preprocessors, n=1)
    known = ", ".join(sorted(_preprocessors)) or "none; register one in a file named by external_plugins"
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"preprocessor {name!r} is not registered (registered: {known}){hint}")


def load_plugins(paths: Sequence[str]) -> None:
    """Run each plugin file once in this process.

    Raises:
        UserError: a file is missing, or raises while it is run.
    """
    for path in paths:
        resolved = Path(path).resolve()
        module_name = "megatron_gkd_plugin_" + hashlib.sha256(str(resolved).encode()).hexdigest()[:16]
        if module_name in sys.modules:
            continue
        if not resolved.is_file():
            raise UserError(f"external_plugins: {path}: no such file")
        spec = importlib.util.spec_from_file_location(module_name, resolved)
        if spec is None or spec.loader is None:
            raise UserError(f"external_plugins: {path}: not a Python file (its name must end in .py)")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise UserError(f"external_plugins: {path}: {type(error).__name__}: {error}") from error

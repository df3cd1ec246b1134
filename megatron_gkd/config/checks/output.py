"""Whether a run can write its output, and overwrites nothing that it reads."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.dataset_names import DatasetName
from megatron_gkd.config.schema import Recipe

_EXPORT = re.compile(r"(hf|adapters)(-step-\d+)?")
_OF_TEACHERS = ("teacher_model", "teacher_adapters", "teacher_cache")


@check("output_dir", needs_files=True)
def output_is_writable(recipe: Recipe, _: int) -> Iterator[str]:
    """Find an output folder that can't be made or written to."""
    key, folder = f"output.output_dir = {recipe.output.output_dir}", Path(recipe.output.output_dir).absolute()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    if not parent.is_dir():
        yield f"{key}: {parent} is a file; must be a folder, or one that can be made"
    elif not os.access(parent, os.W_OK | os.X_OK):
        yield f"{key}: {parent} is not writable; must be a folder that is, or one that can be made"


@check(
    "output_dir",
    "model",
    "tuner_type",
    "adapters",
    "teachers",
    *_OF_TEACHERS,
    "dataset",
    "val_dataset",
    needs_files=True,
)
def sources_are_kept(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a model, adapters, a cache or a data file in an export in output_dir: this run's exports go there."""
    folder = Path(recipe.output.output_dir)
    exports = [path.resolve() for path in folder.glob("*") if _EXPORT.fullmatch(path.name)]
    for key, source in _sources(recipe):
        if not Path(source).exists():
            continue
        resolved = Path(source).resolve()
        if any(export in (resolved, *resolved.parents) for export in exports):
            yield f"output.output_dir = {folder}: {key} = {source} is an export in it; must be another folder"


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "student.model", recipe.student.model
    if recipe.lora is not None and recipe.lora.adapters is not None:
        yield "lora.adapters", recipe.lora.adapters
    for place, teacher in recipe.teacher.all.items():
        paths = ((f"{place}.{leaf}", getattr(teacher, leaf)) for leaf in _OF_TEACHERS)
        yield from ((key, path) for key, path in paths if path is not None)
    for leaf in ("dataset", "val_dataset"):
        yield from ((f"data.{leaf}", _path_of(entry.path)) for entry in getattr(recipe.data, leaf))


def _path_of(name: str) -> str:
    try:
        return DatasetName.parse(name).location
    except ValueError:
        return name  # another check reports it

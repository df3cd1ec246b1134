"""Whether what a run writes leaves alone what it reads."""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.schema import Recipe

_EXPORT = re.compile(r"(hf|adapters)(-step-\d+)?")


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
        if teacher.teacher_model is not None:
            yield f"{place}.teacher_model", teacher.teacher_model
        if teacher.teacher_adapters is not None:
            yield f"{place}.teacher_adapters", teacher.teacher_adapters
        if teacher.teacher_cache is not None:
            yield f"{place}.teacher_cache", teacher.teacher_cache
    for leaf in ("dataset", "val_dataset"):
        yield from ((f"data.{leaf}", entry.path) for entry in getattr(recipe.data, leaf))

"""Whether what a run writes leaves alone what it reads."""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.schema import Recipe


def sources_are_kept(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a model, cache or data file that is, or lies in, an export in output_dir: this run's exports go there."""
    folder = Path(recipe.output.output_dir)
    exports = [path.resolve() for path in folder.glob("hf*") if re.fullmatch(r"hf|hf-step-\d+", path.name)]
    for key, source in _sources(recipe):
        if not Path(source).exists():
            continue
        resolved = Path(source).resolve()
        if any(export in (resolved, *resolved.parents) for export in exports):
            yield f"output.output_dir = {folder}: {key} = {source} is an export in it; must be another folder"


def _sources(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "student.model", recipe.student.model
    for place, teacher in recipe.teacher.all.items():
        if teacher.teacher_model is not None:
            yield f"{place}.teacher_model", teacher.teacher_model
        if teacher.cache is not None:
            yield f"{place}.cache", teacher.cache
    for leaf in ("dataset", "val_dataset"):
        yield from ((f"data.{leaf}", entry.path) for entry in getattr(recipe.data, leaf))

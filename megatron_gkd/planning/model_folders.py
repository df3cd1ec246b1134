"""Folders with the config.json of a recipe's models: of those on the hub, that file alone is downloaded."""

from __future__ import annotations

from pathlib import Path

from megatron_gkd.config.schema import Recipe
from megatron_gkd.errors import UserError
from megatron_gkd.planning.settings import with_models
from megatron_gkd.runtime.hubs import ModelSource, download_configuration


def with_local_models(recipe: Recipe) -> Recipe:
    """Return a recipe whose student and local teachers are folders with a config.json.

    Raises:
        UserError: a model's config.json is neither here nor can be downloaded.
    """
    folders = {}
    for key, source in named_models(recipe).items():
        if not Path(source.name).exists():
            folders[key] = _download(key, source)
    return with_models(recipe, folders) if folders else recipe


def named_models(recipe: Recipe) -> dict[str, ModelSource]:
    """Return the models of the student and the local and self-teachers, by their keys in the recipe."""
    student = ModelSource.of_student(recipe.student)
    teachers = {
        f"{place}.teacher_model": student
        if one.source == "self"
        else ModelSource.of_teacher(one, one.teacher_model, recipe.student)
        for place, one in recipe.teacher.all.items()
        if one.teacher_model is not None and one.source in ("local", "self")
    }
    return {"student.model": student, **teachers}


def _download(key: str, source: ModelSource) -> str:
    try:
        return str(download_configuration(source))
    except UserError as error:
        raise UserError(f"{key} = {source.name}: {error}; name a folder that has it") from error

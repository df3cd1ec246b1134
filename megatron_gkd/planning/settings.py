"""Settings of a recipe's keys that a plan proposes: apply them, check them, and print them ready to paste."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_gkd.config import yaml_text
from megatron_gkd.config.checks import find_problems
from megatron_gkd.config.commands import PLANS
from megatron_gkd.config.keys import SECTION_OF
from megatron_gkd.config.schema import OneTeacher, Recipe

Settings = Mapping[str, Any]
"""Values of a recipe's keys by leaf."""


def apply_settings(recipe: Recipe, settings: Settings) -> Recipe:
    """Return a recipe with other values; keys of teachers are set for each local one of several teachers."""
    tree = recipe.model_dump()
    for leaf, value in settings.items():
        if leaf in OneTeacher.model_fields and tree["teacher"]["teachers"]:
            for entry, teacher in zip(tree["teacher"]["teachers"], recipe.teacher.teachers, strict=True):
                if teacher.source == "local":
                    entry[leaf] = value
        else:
            tree[SECTION_OF[leaf]][leaf] = value
    return Recipe.model_validate(tree)


def with_models(recipe: Recipe, folders: Mapping[str, str]) -> Recipe:
    """Return a recipe with other models, which have no revision, by their keys.

    Args:
        recipe: the recipe.
        folders: by `student.model`, `teacher.teachers[0].teacher_model` and so on.
    """
    tree = recipe.model_dump()
    for place, entry in zip(recipe.teacher.all, tree["teacher"]["teachers"] or [tree["teacher"]], strict=True):
        if f"{place}.teacher_model" in folders:
            entry |= {"teacher_model": folders[f"{place}.teacher_model"], "teacher_model_revision": None}
    if "student.model" in folders:
        tree["student"] |= {"model": folders["student.model"], "model_revision": None}
    return Recipe.model_validate(tree)


def are_valid(recipe: Recipe, world_size: int) -> bool:
    """Return whether a recipe passes all checks that a plan makes."""
    return not find_problems(recipe, world_size, command=PLANS)


def changes(recipe: Recipe, settings: Settings) -> dict[str, Any]:
    """Return those of the settings that differ from the recipe."""
    changed = apply_settings(recipe, settings)
    if changed.teacher.teachers:
        return {leaf: value for leaf, value in settings.items() if apply_settings(recipe, {leaf: value}) != recipe}
    return {
        leaf: value for leaf, value in settings.items() if getattr(getattr(recipe, SECTION_OF[leaf]), leaf) != value
    }


def as_overrides(settings: Settings) -> str:
    """Return settings as the options of a command: `--micro_batch_size 2 --sequence_parallel true`."""
    return " ".join(f"--{leaf} {yaml_text.dump(value).splitlines()[0]}" for leaf, value in settings.items())


def as_sections(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return settings by section, as a recipe has them."""
    sections: dict[str, dict[str, Any]] = {}
    for leaf, value in settings.items():
        sections.setdefault(SECTION_OF[leaf], {})[leaf] = value
    return sections

"""Whether revisions are of models of a hub, and the hub's library is installed."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.checks.teacher import SOURCE
from megatron_gkd.config.schema import Recipe

_NOT_OF_FOLDERS = "only with an id of a hub; {} = {} is a folder, whose files are used as they are"


@check("model", "model_revision", *SOURCE, "teacher_model_revision", needs_files=True)
def revisions_are_of_a_hub(recipe: Recipe, _: int) -> Iterator[str]:
    """Find revisions of folders, which have none."""
    student = recipe.student
    if student.model_revision is not None and Path(student.model).is_dir():
        key = f"student.model_revision = {student.model_revision}"
        yield f"{key}: {_NOT_OF_FOLDERS.format('student.model', student.model)}"
    for place, teacher in recipe.teacher.all.items():
        key, model = f"{place}.teacher_model_revision = {teacher.teacher_model_revision}", teacher.teacher_model
        if teacher.teacher_model_revision is None:
            continue
        if teacher.source == "local" and model and Path(model).is_dir():
            yield f"{key}: {_NOT_OF_FOLDERS.format(f'{place}.teacher_model', model)}"


@check(*SOURCE, "teacher_model_revision")
def revisions_are_of_local_teachers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find revisions of teachers that are not opened here, and of the student."""
    for place, teacher in recipe.teacher.all.items():
        key = f"{place}.teacher_model_revision = {teacher.teacher_model_revision}"
        if teacher.teacher_model_revision is None or teacher.source == "local":
            continue
        hint = "; that of the student is student.model_revision" if teacher.source == "self" else ""
        yield f"{key}: only with {place}.teacher_kind = local{hint}"


@check("model", "use_hf", *SOURCE, needs_files=True)
def hub_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find models of ModelScope without its library."""
    if recipe.student.use_hf:
        return
    teachers = [one.teacher_model for one in recipe.teacher.all.values() if one.source == "local"]
    model = next((one for one in (recipe.student.model, *teachers) if one and not Path(one).exists()), None)
    if model is not None and importlib.util.find_spec("modelscope") is None:
        yield (
            f"student.use_hf = false: {model} is a model of ModelScope, whose library is not installed here (pip "
            "install modelscope); or set it to true"
        )

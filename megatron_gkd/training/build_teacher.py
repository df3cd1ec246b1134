"""The teacher that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from megatron_gkd.config.schema import OneTeacher, Recipe, TeacherSection
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
from megatron_gkd.models.vocabulary import shared_vocab_size
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import TeacherSource
from megatron_gkd.teachers.local import LocalTeacher
from megatron_gkd.teachers.several import SeveralTeachers
from megatron_gkd.training.build import DTYPES
from megatron_gkd.training.student import Student


def open_teachers(section: TeacherSection, *, main_process: bool, barrier: Callable[[], None]) -> dict[str, Checkpoint]:
    """The local teachers' checkpoints, by their places in the recipe."""
    return {
        place: Checkpoint.open(teacher.teacher_model, main_process=main_process, barrier=barrier)
        for place, teacher in section.all.items()
        if teacher.source == "local"
    }


def shared_vocab_size_of_all(student: Checkpoint, teachers: Mapping[str, Checkpoint]) -> int:
    """Number of ids that all models have logits for. UserError if a tokenizer differs from the student's."""
    return min([student.vocab_size, *(shared_vocab_size(student, teacher) for teacher in teachers.values())])


def build_teacher(
    recipe: Recipe, mesh: Mesh, student: Student, checkpoints: Mapping[str, Checkpoint]
) -> TeacherSource | None:
    """What judges the student, laid out like it; None for plain cross-entropy. `checkpoints`: of ``open_teachers``."""
    teachers = recipe.teacher.all.items()
    found = {place: _one(recipe, mesh, student, teacher, checkpoints.get(place)) for place, teacher in teachers}
    if not recipe.teacher.teachers:
        return found["teacher"]
    return SeveralTeachers({teacher.tags: found[place] for place, teacher in teachers}, mesh)


def _one(
    recipe: Recipe, mesh: Mesh, student: Student, teacher: OneTeacher, checkpoint: Checkpoint | None
) -> TeacherSource | None:
    match teacher.source:
        case "local":
            return _local(recipe, mesh, student, teacher, checkpoint)
        case "none":
            return None
    raise NotImplementedError(teacher.source)


def _local(recipe: Recipe, mesh: Mesh, student: Student, teacher: OneTeacher, checkpoint: Checkpoint) -> LocalTeacher:
    options = BuildOptions(dtype=DTYPES[recipe.train.dtype], attn=recipe.train.attn)
    model = MegatronModel.load(checkpoint, mesh, options)
    head_rows = -(-student.model.checkpoint.vocab_size // mesh.tp.size())
    return LocalTeacher(model, head_rows=head_rows, offload=teacher.offload_teacher_model)

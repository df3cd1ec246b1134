"""The teacher that a recipe names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import OneTeacher, Recipe, TeacherSection
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
from megatron_gkd.models.vocabulary import shared_vocab_size
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import TeacherSource
from megatron_gkd.teachers.cache import CachedTeacher, open_cache
from megatron_gkd.teachers.cache_manifest import Manifest
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


def read_manifests(section: TeacherSection, tokenizer: PreTrainedTokenizerBase) -> list[Manifest]:
    """What the teachers' caches say of themselves. UserError if one is of another tokenizer than this, the student's.

    The tokenizers' whole content must be the same: rows are found by their token ids.
    """
    manifests = []
    for place, teacher in section.all.items():
        if teacher.cache is not None:
            manifests.append(Manifest.read(teacher.cache))
            if manifests[-1].tokenizer != hash_tokenizer(tokenizer):
                key = f"{place}.cache = {teacher.cache}"
                raise UserError(f"{key}: its rows are of another tokenizer than the student's")
    return manifests


def build_teacher(
    recipe: Recipe, mesh: Mesh, student: Student | None, checkpoints: Mapping[str, Checkpoint]
) -> TeacherSource | None:
    """What judges the student, laid out like it; None for plain cross-entropy.

    Args:
        student: None where the teacher's signals are not for a loss, but for a cache. Caches of the recipe are not
            read then.
        checkpoints: of ``open_teachers``.
    """
    teachers = recipe.teacher.all.items()
    found = {place: _one(recipe, mesh, student, teacher, checkpoints.get(place)) for place, teacher in teachers}
    if not recipe.teacher.teachers:
        return found["teacher"]
    return SeveralTeachers({teacher.tags: found[place] for place, teacher in teachers}, mesh)


def _one(
    recipe: Recipe, mesh: Mesh, student: Student | None, teacher: OneTeacher, checkpoint: Checkpoint | None
) -> TeacherSource | None:
    live = _live(recipe, mesh, student, teacher, checkpoint)
    if teacher.cache is None or student is None:
        return live
    return CachedTeacher(open_cache(teacher.cache), mesh, k=recipe.distill.gkd_logits_topk, rest=live)


def _live(
    recipe: Recipe, mesh: Mesh, student: Student | None, teacher: OneTeacher, checkpoint: Checkpoint | None
) -> TeacherSource | None:
    match teacher.source:
        case "local":
            return _local(recipe, mesh, student, teacher, checkpoint)
        case "none" | "cache":
            return None
    raise NotImplementedError(teacher.source)


def _local(
    recipe: Recipe, mesh: Mesh, student: Student | None, teacher: OneTeacher, checkpoint: Checkpoint
) -> LocalTeacher:
    options = BuildOptions(dtype=DTYPES[recipe.train.dtype], attn=recipe.train.attn)
    model = MegatronModel.load(checkpoint, mesh, options)
    compared = checkpoint if student is None else student.model.checkpoint
    head_rows = -(-compared.vocab_size // mesh.tp.size())
    return LocalTeacher(model, head_rows=head_rows, offload=teacher.offload_teacher_model)

"""The teacher that a recipe names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.schema import OneTeacher, Recipe, TaggedTeacher, TeacherSection
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import BuildOptions
from megatron_gkd.models.vocabulary import shared_vocab_size
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.teachers.base import TeacherSource
from megatron_gkd.teachers.cache.manifest import Manifest
from megatron_gkd.teachers.cache.teacher import CachedTeacher, open_cache, require_rows
from megatron_gkd.teachers.local import LocalTeacher
from megatron_gkd.teachers.self_teacher import SelfTeacher, require_teacher_prompts
from megatron_gkd.teachers.self_weights import AverageWeights, BaseWeights, CurrentWeights, InitialWeights
from megatron_gkd.teachers.server.teacher import ServerOptions, ServerTeacher
from megatron_gkd.teachers.several import SeveralTeachers, require_teachers
from megatron_gkd.training.build import DTYPES
from megatron_gkd.training.load_model import load_model
from megatron_gkd.training.student import Student


def open_teachers(section: TeacherSection, nodes: Nodes) -> dict[str, Checkpoint]:
    """The local teachers' checkpoints, by their places in the recipe."""
    opened = {}
    for place, teacher in section.all.items():
        if teacher.source == "local":
            with phase(f"Opening the teacher {teacher.teacher_model}", is_main=nodes.is_main):
                opened[place] = Checkpoint.open(teacher.teacher_model, nodes)
                if teacher.teacher_adapters is not None:
                    folder, key = Path(teacher.teacher_adapters), f"{place}.teacher_adapters"
                    opened[place] = opened[place].with_adapters(folder, key)
    return opened


def shared_vocab_size_of_all(student: Checkpoint, teachers: Mapping[str, Checkpoint]) -> int:
    """Number of ids that all models have logits for. UserError if a tokenizer differs from the student's."""
    return min([student.vocab_size, *(shared_vocab_size(student, teacher) for teacher in teachers.values())])


def read_manifests(section: TeacherSection, tokenizer: PreTrainedTokenizerBase) -> list[Manifest]:
    """What the teachers' caches say of themselves. UserError if one is of another tokenizer than this, the student's.

    The tokenizers' whole content must be the same: rows are found by their token ids.
    """
    manifests = []
    for place, teacher in section.all.items():
        if teacher.teacher_cache is not None:
            manifests.append(Manifest.read(teacher.teacher_cache))
            if manifests[-1].tokenizer != hash_tokenizer(tokenizer):
                key = f"{place}.teacher_cache = {teacher.teacher_cache}"
                raise UserError(f"{key}: its rows are of another tokenizer than the student's")
    return manifests


def averages_of(teacher: TeacherSource | None) -> tuple[AverageWeights, ...]:
    """Return the moving averages that a teacher's weights are, which change with every step."""
    match teacher:
        case SelfTeacher(weights=AverageWeights() as average):
            return (average,)
        case SeveralTeachers(teachers=teachers):
            return tuple(average for one in teachers.values() for average in averages_of(one))
        case CachedTeacher(rest=rest):
            return averages_of(rest)
    return ()


def check_rows(section: TeacherSection, dataset: TokenizedDataset) -> None:
    """UserError where the training rows lack what a teacher needs."""
    for place, teacher in section.all.items():
        if teacher.source == "self" and teacher.teacher_model is None and teacher.teacher_ema is None:
            require_teacher_prompts(dataset, place)
    check_tags(section, dataset)


def check_tags(section: TeacherSection, dataset: TokenizedDataset) -> None:
    """UserError for a row that has the tag of none of several teachers."""
    if section.teachers:
        require_teachers(
            dataset, (tag for teacher in section.teachers for tag in teacher.tags), section.teacher_tag_key
        )


def require_cached_rows(section: TeacherSection, dataset: TokenizedDataset, name: str) -> None:
    """UserError for a row that a cache without a teacher beside it hasn't: now, and not after hours.

    All ranks must call it. `name`: of the dataset.
    """
    for teacher in section.all.values():
        if teacher.source == "cache":
            tags = teacher.tags if isinstance(teacher, TaggedTeacher) else None
            require_rows(open_cache(teacher.teacher_cache), dataset, name, tags)


def begins_as_student(section: TeacherSection, student: Checkpoint, teachers: Mapping[str, Checkpoint]) -> bool:
    """Whether every teacher has the weights that the student begins with. `teachers`: of ``open_teachers``."""

    def is_same(place: str) -> bool:
        return place in teachers and teachers[place].has_weights_of(student)

    return all(teacher.source == "self" or is_same(place) for place, teacher in section.all.items())


def build_teacher(
    recipe: Recipe, mesh: Mesh, student: Student | Checkpoint, checkpoints: Mapping[str, Checkpoint]
) -> TeacherSource | None:
    """What judges the student, laid out like it; None for plain cross-entropy.

    Args:
        student: in training; or the checkpoint that it begins as, where the teacher's signals are not for a loss but
            for a cache. Caches of the recipe are not read then.
        checkpoints: of ``open_teachers``.
    """
    teachers = recipe.teacher.all.items()
    found = {place: _one(recipe, mesh, student, teacher, checkpoints.get(place)) for place, teacher in teachers}
    if not recipe.teacher.teachers:
        return found["teacher"]
    return SeveralTeachers({teacher.tags: found[place] for place, teacher in teachers}, mesh)


def _one(
    recipe: Recipe, mesh: Mesh, student: Student | Checkpoint, teacher: OneTeacher, checkpoint: Checkpoint | None
) -> TeacherSource | None:
    live = _live(recipe, mesh, student, teacher, checkpoint)
    if teacher.teacher_cache is None or isinstance(student, Checkpoint):
        return live
    return CachedTeacher(open_cache(teacher.teacher_cache), mesh, k=recipe.distill.gkd_logits_topk, rest=live)


def _live(
    recipe: Recipe, mesh: Mesh, student: Student | Checkpoint, teacher: OneTeacher, checkpoint: Checkpoint | None
) -> TeacherSource | None:
    match teacher.source:
        case "local":
            return _local(recipe, mesh, student, teacher, checkpoint)
        case "self":
            return _self(student, teacher) if isinstance(student, Student) else _initial(recipe, mesh, student)
        case "server":
            return _server(recipe, mesh, student, teacher)
        case "none" | "cache":
            return None
    raise ValueError(f"a teacher of kind {teacher.source}, which the recipe's checks refuse")


def _local(
    recipe: Recipe, mesh: Mesh, student: Student | Checkpoint, teacher: OneTeacher, checkpoint: Checkpoint
) -> LocalTeacher | SelfTeacher:
    if isinstance(student, Student) and student.model.adapters is not None:
        if checkpoint.has_weights_of(student.model.checkpoint):  # without a second copy
            return SelfTeacher(student.model, BaseWeights(student.model), student.gather_parameters)
    options = BuildOptions(dtype=DTYPES[recipe.train.dtype], attn=recipe.train.attention_backend)
    model = load_model(f"the teacher {teacher.teacher_model}", checkpoint, mesh, options)
    head_rows = -(-_checkpoint_of(student).vocab_size // mesh.tp.size())
    return LocalTeacher(model, head_rows=head_rows, offload=teacher.offload_teacher_model)


def _self(student: Student, teacher: OneTeacher) -> SelfTeacher:
    """Before the student's first step: the weights that it begins with are the checkpoint's."""
    model, complete = student.model, student.gather_parameters
    if teacher.teacher_ema is not None:
        weights = AverageWeights(model, teacher.teacher_ema, complete)
    elif teacher.teacher_model is None:
        weights = CurrentWeights(model)
    else:
        weights = InitialWeights(model) if model.adapters is None else BaseWeights(model)
    return SelfTeacher(model, weights, complete)


def _initial(recipe: Recipe, mesh: Mesh, student: Checkpoint) -> SelfTeacher:
    """The student as it begins, of which nothing is trained."""
    options = BuildOptions(dtype=DTYPES[recipe.train.dtype], attn=recipe.train.attention_backend)
    model = load_model(f"the student {recipe.student.model}", student, mesh, options)
    return SelfTeacher(model, CurrentWeights(model), lambda: None)


def _checkpoint_of(student: Student | Checkpoint) -> Checkpoint:
    return student.model.checkpoint if isinstance(student, Student) else student


def _server(recipe: Recipe, mesh: Mesh, student: Student | Checkpoint, teacher: OneTeacher) -> ServerTeacher:
    options = ServerOptions(
        urls=teacher.teacher_model_server,
        k=recipe.distill.gkd_logits_topk,
        max_length=recipe.data.longest_for_teacher,
        concurrency=teacher.teacher_server_concurrency,
        timeout=teacher.teacher_server_timeout_s,
        patience=teacher.teacher_server_max_downtime_s,
        # A cache outlives the run: nothing is written that was not checked.
        check_interval=teacher.teacher_server_check_interval if isinstance(student, Student) else 1,
    )
    checkpoint = _checkpoint_of(student)
    vocab_size = student.objective.vocab_size if isinstance(student, Student) else checkpoint.vocab_size
    return ServerTeacher(mesh, checkpoint.tokenizer(), vocab_size, options)

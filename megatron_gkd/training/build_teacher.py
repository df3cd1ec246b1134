"""Build the teacher that a recipe names, and check the rows against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.config.api_keys import ApiKeyVariable
from megatron_gkd.config.schema import OneTeacher, Recipe, TaggedTeacher, TeacherSection
from megatron_gkd.data.cache import hash_tokenizer
from megatron_gkd.data.vision.comparison import hash_processing
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.processor import PixelLimits
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.token_bytes import TokenBytes
from megatron_gkd.models.tokenizer_comparison import Mode, compare_tokenizers, list_file, report_differences
from megatron_gkd.models.vocabulary import shared_vocab_size
from megatron_gkd.reporting.logging import LOGGER
from megatron_gkd.reporting.phases import phase
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.nodes import Nodes
from megatron_gkd.teachers.base import TeacherSource
from megatron_gkd.teachers.cache.teacher import CachedTeacher, open_cache
from megatron_gkd.teachers.label_states import ScoringOptions
from megatron_gkd.teachers.local import LocalTeacher
from megatron_gkd.teachers.model_inputs import ModelInputs
from megatron_gkd.teachers.self_teacher import SelfTeacher
from megatron_gkd.teachers.self_weights import (
    AverageWeights,
    BaseWeights,
    CurrentWeights,
    InitialWeights,
    TeacherWeights,
)
from megatron_gkd.teachers.server.teacher import ServerTeacher, TeacherServerOptions
from megatron_gkd.teachers.several import SeveralTeachers
from megatron_gkd.training.build import load_model
from megatron_gkd.training.model_options import has_fp8_of_student, teacher_options, untrained_student_options
from megatron_gkd.training.student import Student
from megatron_gkd.training.teacher_rows import require_key


def open_teachers(recipe: Recipe, nodes: Nodes) -> dict[str, Checkpoint]:
    """Open the local teachers' checkpoints, by their keys in the recipe. All ranks must call it."""
    opened = {}
    for place, teacher in recipe.teacher.all.items():
        if teacher.source == "local":
            name = require_key(teacher.teacher_model, f"{place}.teacher_model")
            with phase(f"Opening the teacher {name}", is_main=nodes.is_main):
                source = ModelSource.of_teacher(teacher, name, recipe.student)
                opened[place] = Checkpoint.open(source, nodes, trust_remote_code=teacher.teacher_trust_remote_code)
                if teacher.teacher_adapters is not None:
                    folder, key = Path(teacher.teacher_adapters), f"{place}.teacher_adapters"
                    opened[place] = opened[place].with_adapters(folder, key)
    return opened


def shared_vocab_size_of_all(student: Checkpoint, teachers: Mapping[str, Checkpoint]) -> int:
    """Return the number of ids that all models have logits for."""
    return min([student.vocab_size, *(shared_vocab_size(student, teacher) for teacher in teachers.values())])


def check_tokenizers(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, teachers: Mapping[str, Checkpoint], *, is_main: bool
) -> None:
    """Refuse local teachers with another tokenizer than the student's, or warn of them.

    Args:
        recipe: of the run.
        tokenizer: the student's.
        teachers: see `open_teachers`.
        is_main: whether this rank warns.

    Raises:
        UserError: a tokenizer differs, and teacher.check_tokenizers is strict.
    """
    mode = recipe.teacher.check_tokenizers
    for place, teacher in teachers.items():
        differences = compare_tokenizers(tokenizer, teacher.tokenizer())
        name = f"{place}.teacher_model = {recipe.teacher.all[place].teacher_model}"
        if is_main or mode == "strict":
            report_differences(differences, name, mode, list_file(recipe.output.output_dir, place))


def open_images(recipe: Recipe, checkpoint: Checkpoint) -> ImageProcessing | None:
    """Open what a checkpoint's processor makes of images within the recipe's limits; None for a text model."""
    return checkpoint.images(PixelLimits(recipe.data.min_pixels, recipe.data.max_pixels))


def read_manifests(
    section: TeacherSection, tokenizer: PreTrainedTokenizerBase, images: ImageProcessing | None = None
) -> list[Manifest]:
    """Return the manifests of the teachers' caches.

    Args:
        section: the recipe's teachers.
        tokenizer: the student's.
        images: what the student's processor makes of images; None for a text model.

    Raises:
        UserError: a cache is of another tokenizer or processor than the student's. Names of tokens and the chat
            template may differ: cached rows are found by their token ids.
    """
    manifests = []
    processing = None if images is None else hash_processing(images)
    for place, teacher in section.all.items():
        if teacher.teacher_cache is not None:
            manifests.append(Manifest.read(teacher.teacher_cache))
            if not _has_tokens_of(manifests[-1], tokenizer):
                _report_cache(f"{place}.teacher_cache = {teacher.teacher_cache}", section.check_tokenizers)
            if manifests[-1].images != processing:
                key = f"{place}.teacher_cache = {teacher.teacher_cache}"
                raise UserError(
                    f"{key}: its images were read with other settings than the student's; score the rows anew with "
                    "this student.model, data.min_pixels and data.max_pixels"
                )
    return manifests


def _has_tokens_of(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the ids of a cache are the same tokens as the tokenizer's."""
    if manifest.tokenizer == hash_tokenizer(tokenizer):
        return True
    return manifest.vocabulary is not None and manifest.vocabulary == TokenBytes.from_tokenizer(tokenizer).digest()


def _report_cache(key: str, mode: Mode) -> None:
    problem = f"{key}: its rows are of another tokenizer than the student's"
    if mode == "strict":
        raise UserError(f"{problem}; score the rows anew with this student.model")
    LOGGER.warning("%s; their ids are taken for the student's (teacher.check_tokenizers = warn)", problem)


def averages_of(teacher: TeacherSource | None) -> tuple[AverageWeights, ...]:
    """Return the moving averages among a teacher's weights, which change with every step."""
    if teacher is None:
        return ()
    match teacher:
        case SelfTeacher(weights=AverageWeights() as average):
            return (average,)
        case SeveralTeachers(teachers=teachers):
            return tuple(average for one in teachers.values() for average in averages_of(one))
        case CachedTeacher(fallback=fallback):
            return averages_of(fallback)
    return ()


def begins_as_student(section: TeacherSection, student: Checkpoint, teachers: Mapping[str, Checkpoint]) -> bool:
    """Return whether every teacher has the weights that the student starts with. `teachers`: see `open_teachers`."""

    def is_same(place: str) -> bool:
        return place in teachers and teachers[place].has_weights_of(student)

    return all(teacher.source == "self" or is_same(place) for place, teacher in section.all.items())


def build_teacher(
    recipe: Recipe,
    mesh: Mesh,
    student: Student | Checkpoint,
    checkpoints: Mapping[str, Checkpoint],
    *,
    has_images: bool = False,
) -> TeacherSource | None:
    """Build the teacher with the student's layout; None for plain cross-entropy. All ranks must call it.

    Args:
        recipe: of the run.
        mesh: how the teacher is sharded.
        student: in training; or the checkpoint that it starts as, where the teacher's signals are not for a loss but
            for a cache. The recipe's caches are not read then.
        checkpoints: see `open_teachers`.
        has_images: whether rows have images, which servers must be able to read.
    """
    builder = _TeacherBuilder(recipe, mesh, student, checkpoints, has_images)
    if not recipe.teacher.teachers:
        return builder.build("teacher", recipe.teacher)
    teachers = {}
    for place, teacher in recipe.teacher.all.items():
        built = builder.build(place, teacher)
        if isinstance(teacher, TaggedTeacher) and built is not None:
            teachers[teacher.tags] = built
    return SeveralTeachers(teachers, mesh)


@dataclass(frozen=True)
class _TeacherBuilder:
    """Builds one teacher after the other; see `build_teacher` for the attributes."""

    recipe: Recipe
    mesh: Mesh
    student: Student | Checkpoint
    checkpoints: Mapping[str, Checkpoint]
    has_images: bool

    @cached_property
    def images(self) -> ImageProcessing | None:
        return open_images(self.recipe, self.student_checkpoint)

    @property
    def student_checkpoint(self) -> Checkpoint:
        return self.student.model.checkpoint if isinstance(self.student, Student) else self.student

    def build(self, place: str, teacher: OneTeacher) -> TeacherSource | None:
        """Build the teacher at a key of the recipe, behind its cache if it has one."""
        live = self._build_live(place, teacher)
        if teacher.teacher_cache is None or isinstance(self.student, Checkpoint):
            return live
        cache = open_cache(teacher.teacher_cache)
        return CachedTeacher(cache, self.mesh, k=self.recipe.distill.gkd_logits_topk, fallback=live)

    def _build_live(self, place: str, teacher: OneTeacher) -> TeacherSource | None:
        match teacher.source:
            case "local":
                return self._build_local(place, teacher, self.checkpoints[place])
            case "self":
                return self._build_self(teacher, self.student)
            case "server":
                return self._build_server(place, teacher)
            case "none" | "cache":
                return None
        raise ValueError(f"{place}.teacher_kind = {teacher.source}: unknown kind, which the recipe's checks refuse")

    def _build_local(self, place: str, teacher: OneTeacher, checkpoint: Checkpoint) -> TeacherSource:
        student = self.student
        if isinstance(student, Student) and student.model.adapters is not None:
            is_same = checkpoint.has_weights_of(student.model.checkpoint)
            if is_same and has_fp8_of_student(teacher, self.recipe):  # without a second copy
                weights = BaseWeights(student.model)
                options = _scoring_options(teacher)
                return SelfTeacher(student.model, weights, student.gather_parameters, self.images, options)
        model = load_model(
            f"the teacher {teacher.teacher_model}", checkpoint, self.mesh, teacher_options(self.recipe, place, teacher)
        )
        head_rows = -(-self.student_checkpoint.vocab_size // self.mesh.tp.size())
        inputs = ModelInputs(self.images, open_images(self.recipe, checkpoint))
        return LocalTeacher(
            model,
            head_rows=head_rows,
            inputs=inputs,
            offload=teacher.offload_teacher_model,
            options=_scoring_options(teacher),
        )

    def _build_self(self, teacher: OneTeacher, student: Student | Checkpoint) -> TeacherSource:
        if isinstance(student, Checkpoint):  # nothing is trained: all kinds of its weights are the same
            model = load_model(
                f"the student {self.recipe.student.model}", student, self.mesh, untrained_student_options(self.recipe)
            )
            return SelfTeacher(model, CurrentWeights(model), lambda: None, self.images, _scoring_options(teacher))
        weights = _choose_weights(student, teacher)
        return SelfTeacher(student.model, weights, student.gather_parameters, self.images, _scoring_options(teacher))

    def _build_server(self, place: str, teacher: OneTeacher) -> TeacherSource:
        student, checkpoint = self.student, self.student_checkpoint
        is_training = isinstance(student, Student)
        options = TeacherServerOptions(
            urls=teacher.teacher_model_server,
            k=require_key(self.recipe.distill.gkd_logits_topk, "distill.gkd_logits_topk"),
            max_length=self.recipe.data.longest_for_teacher,
            has_images=self.has_images,
            concurrency=teacher.teacher_server_concurrency,
            timeout=teacher.teacher_server_timeout_s,
            max_downtime=teacher.teacher_server_max_downtime_s,
            # A cache outlives the run: every row that is written to one is checked before.
            check_interval=teacher.teacher_server_check_interval if is_training else 1,
            api_key=ApiKeyVariable(f"{place}.teacher_server_api_key_env", teacher.teacher_server_api_key_env),
            check_tokenizers=self.recipe.teacher.check_tokenizers,
            differences_file=list_file(self.recipe.output.output_dir, place),
        )
        vocab_size = student.objective.vocab_size if isinstance(student, Student) else checkpoint.vocab_size
        return ServerTeacher(self.mesh, checkpoint.tokenizer(), vocab_size, options, self.images)


def _scoring_options(teacher: OneTeacher) -> ScoringOptions:
    return ScoringOptions(teacher.teacher_states == "host", teacher.teacher_micro_batch_tokens)


def _choose_weights(student: Student, teacher: OneTeacher) -> TeacherWeights:
    """Return the weights of a self-teacher, before the student's first step."""
    model = student.model
    if teacher.teacher_ema is not None:
        return AverageWeights(model, teacher.teacher_ema, student.gather_parameters)
    if teacher.teacher_model is None:
        return CurrentWeights(model)
    return InitialWeights(model) if model.adapters is None else BaseWeights(model)

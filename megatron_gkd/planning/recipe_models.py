"""What a plan takes of a recipe: its models' configurations, and the keys that make no difference where it is made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_gkd.config.schema import OneTeacher, Recipe
from megatron_gkd.data.microbatch import padded_length
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.planning.costs import MeasureOptions
from megatron_gkd.planning.microbatch import MicrobatchSize
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.mesh import Layout

_FUSIONS = ("gradient_accumulation_fusion", "masked_softmax_fusion", "apply_rope_fusion", "moe_permute_fusion")
_BUSIEST = (
    "Each expert-parallel rank counts as the busiest, with {imbalance:g} times the mean number of tokens: the FLOPs of "
    "all GPUs together are fewer, and so is their share of the peak."
)


@dataclass(frozen=True)
class RecipeModels:
    """A recipe that can be planned here.

    Attributes:
        recipe: without what needs files or kernels that a plan does not have.
        world_size: number of ranks.
        student: the student's configuration.
        teachers: those of the local teachers, by their keys in the recipe.
        options: what is assumed.
        notes: what is planned otherwise than it runs, in whole sentences.
    """

    recipe: Recipe
    world_size: int
    student: Checkpoint
    teachers: dict[str, Checkpoint]
    options: MeasureOptions
    notes: tuple[str, ...]

    @classmethod
    def open(cls, recipe: Recipe, world_size: int, options: MeasureOptions) -> RecipeModels:
        """Open the configurations of a recipe's models.

        Raises:
            UserError: there is no such model, or it is not supported.
        """
        teachers = {
            place: Checkpoint.open_configuration(ModelSource.of_teacher(teacher, teacher.teacher_model, recipe.student))
            for place, teacher in recipe.teacher.all.items()
            if teacher.source == "local" and teacher.teacher_model is not None
        }
        student = Checkpoint.open_configuration(ModelSource.of_student(recipe.student))
        plain, notes = _without_files_and_kernels(recipe)
        notes += _notes_of_models({"student.model": student, **teachers}, options)
        if not recipe.teacher.teachers and not recipe.teacher.is_named:
            notes.append(
                "No teacher is named: the student is planned as its own, which rows with a teacher_prompt need."
            )
        if recipe.parallel.expert_model_parallel_size > 1 and options.expert_imbalance > 1:
            notes.append(_BUSIEST.format(imbalance=options.expert_imbalance))
        return cls(plain, world_size, student, teachers, options, tuple(notes))

    @property
    def layout(self) -> Layout:
        """The ranks' layout."""
        return Layout.from_section(self.recipe.parallel)

    @property
    def vocab_size(self) -> int:
        """Number of ids that all models have."""
        return min(one.vocab_size for one in (self.student, *self.teachers.values()))

    @property
    def microbatches(self) -> int:
        """Number of the student's microbatches in a step of one rank."""
        rows = self.recipe.train.global_batch_size // self.recipe.data_parallel_size(self.world_size)
        per_microbatch = self._rows_of_microbatch()
        count = max(1, -(-rows // per_microbatch))
        layout = self.layout
        return padded_length(count, layout.pipeline) if layout.virtual_pipeline else count

    def student_size(self) -> MicrobatchSize:
        """Return the size of the student's microbatches."""
        data, train = self.recipe.data, self.recipe.train
        tokens = self.options.microbatch_tokens
        if tokens is None:
            tokens = data.max_length * (1 if data.packing else train.micro_batch_size)
        return MicrobatchSize.from_tokens(tokens, data.max_length, self.options.label_fraction, self.layout)

    def teacher_size(self, teacher: OneTeacher) -> tuple[MicrobatchSize, int]:
        """Return the size of a teacher's microbatches, and their number in a step of one rank."""
        student, count = self.student_size(), self.microbatches
        longest = self.recipe.data.longest_for_teacher
        longer = longest / self.recipe.data.max_length
        tokens = round(student.tokens * longer)
        wanted = teacher.teacher_micro_batch_tokens
        if wanted is not None and teacher.source == "local":
            total = tokens * count
            tokens = min(total, max(tokens // student.sequences, wanted))
            count = -(-total // tokens)
        # The labels are the student's, of as many microbatches as are scored together.
        fraction = student.labels / max(1.0, student.tokens * longer)
        return MicrobatchSize.from_tokens(tokens, longest, fraction, self.layout), count

    def _rows_of_microbatch(self) -> int:
        """Return how many of a step's rows are in a microbatch; packed rows are taken to be of `max_length`."""
        if self.options.microbatch_tokens is not None:
            return max(1, self.options.microbatch_tokens // self.recipe.data.max_length)
        return 1 if self.recipe.data.packing else self.recipe.train.micro_batch_size


def _without_files_and_kernels(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """Return a recipe that builds without weights, adapters' files and kernels of GPUs, and what differs by that."""
    notes = []
    megatron = recipe.megatron
    changes = {name: "auto" for name in _FUSIONS if getattr(megatron, name) == "on"}
    if megatron.fp8_format is not None or any(one.teacher_fp8_format for one in recipe.teacher.all.values()):
        notes.append("Layers in FP8 are counted in train.dtype.")
    if megatron.moe_token_dispatcher_type == "flex":
        notes.append("The token dispatcher flex is counted as alltoall.")
        changes["moe_token_dispatcher_type"] = "alltoall"
    section = recipe.teacher
    plain_teachers = tuple(one.model_copy(update={"teacher_fp8_format": None}) for one in section.teachers)
    teacher = section.model_copy(update={"teacher_fp8_format": None, "teachers": plain_teachers})
    megatron = megatron.model_copy(update={**changes, "fp8_format": None})
    lora = None if recipe.lora is None else recipe.lora.model_copy(update={"adapters": None})
    return recipe.model_copy(update={"megatron": megatron, "teacher": teacher, "lora": lora}), notes


def _notes_of_models(models: dict[str, Checkpoint], options: MeasureOptions) -> Iterator[str]:
    for key, checkpoint in models.items():
        if checkpoint.has_images:
            yield f"{key}: the activations, FLOPs and messages of the vision tower are not counted; its parameters are."
        if checkpoint.shape.delta_heads:
            yield f"{key}: the kernels of its gated delta nets are counted by formulas."
    if not options.transformer_engine:
        yield "Without Transformer Engine, torch's attention needs more memory where its flash kernel can't run."

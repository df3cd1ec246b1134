"""The second part of a run: build the student, the teacher and the rollout engine, and load a checkpoint into them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.loader import StepLoader, validation_batches
from megatron_gkd.rollout.vllm.logit_bias import logit_bias
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import ScoresAhead, TeacherSource
from megatron_gkd.training.batches import AgreedBatches, TrainingData
from megatron_gkd.training.build import build_engine, build_student, rollout_tensors, sampling_of
from megatron_gkd.training.build_teacher import averages_of, build_teacher
from megatron_gkd.training.checkpointing.loader import load, load_weights
from megatron_gkd.training.checkpointing.resume import find_checkpoint
from megatron_gkd.training.checkpointing.state import Saved
from megatron_gkd.training.on_policy import OnSample, RolloutOptions, Rollouts
from megatron_gkd.training.prepare import PreparedRun
from megatron_gkd.training.step_prompts import StepPrompts
from megatron_gkd.training.student import Student
from megatron_gkd.training.student_offload import OffloadOptions, StudentOffload


@dataclass(frozen=True)
class AssembledRun:
    """The parts of a run in memory.

    Attributes:
        student: the model in training.
        teacher: the source of the teacher's distributions; None trains with plain cross-entropy.
        data: training and validation batches, and what samples.
        saved: the parts whose tensors a checkpoint holds.
    """

    student: Student
    teacher: TeacherSource | None
    data: TrainingData
    saved: Saved


def assemble(recipe: Recipe, mesh: Mesh, prepared: PreparedRun) -> AssembledRun:
    """Build the parts of a run and load the weights that it starts with. All ranks must call it."""
    train_iters = prepared.train_iters
    student = build_student(recipe, mesh, prepared.models.student, prepared.vocab_size, train_iters)
    teacher = build_teacher(recipe, mesh, student, prepared.models.teachers, has_images=prepared.has_images)
    rollouts = None if recipe.distill.lmbda == 0 else build_rollouts(recipe, mesh, prepared, student, teacher)
    batches = StepLoader(
        prepared.training.samples,
        prepared.training.order,
        prepared.batch_config,
        range(prepared.last_step + 1, train_iters + 1),
        # All ranks read the rows of a stream together, which other processes can't; those tokenize.
        num_workers=0 if recipe.data.streaming else recipe.data.dataloader_num_workers,
        skip=partial(prepared.lambda_schedule.any, count=recipe.train.global_batch_size),
    )
    validation = None
    if prepared.validation is not None:
        validation = validation_batches(prepared.validation, prepared.batch_config, recipe.train.eval_iters)
    saved = Saved(student, averages_of(teacher), recipe.output.save_optim)
    if prepared.point is not None:
        load(saved, prepared.point.path, prepared.point.step)
    elif recipe.train.init_from is not None:
        load_weights(saved, find_checkpoint(recipe.train.init_from, "train.init_from"))
    agreed = None if validation is None else AgreedBatches(validation)
    data = TrainingData(AgreedBatches(batches), agreed, rollouts, prepared.training.stream)
    return AssembledRun(student, teacher, data, saved)


def build_rollouts(
    recipe: Recipe, mesh: Mesh, prepared: PreparedRun, student: Student, teacher: TeacherSource | None
) -> Rollouts:
    """Build what samples the steps that the lambda schedule gives to the student."""
    section = recipe.rollout
    checkpoint, images = prepared.models.student, prepared.models.images
    sampling = sampling_of(
        recipe, prepared.ends.token_ids, student.objective.vocab_size, prepared.models.find_reserved_ids()
    )
    if section.engine != "megatron":
        logit_bias(sampling, checkpoint.vocab_size)  # too many excluded ids end the run before the engine starts
    offload = StudentOffload(student, OffloadOptions(recipe.memory.offload_model, recipe.memory.offload_optimizer))
    options = RolloutOptions(
        sampling,
        truncated=section.truncated_completions,
        steps_ahead=section.steps_ahead,
        num_steps=prepared.train_iters,
        tensors=rollout_tensors(recipe),
        make_room=offload.away,
    )
    prompts = StepPrompts(
        prepared.training.samples,
        prepared.training.order,
        prepared.lambda_schedule,
        prepared.batch_config,
        recipe.data.teacher_max_length,
    )
    with offload.away():  # vLLM measures how much memory is free
        engine = build_engine(recipe, mesh, student.model, checkpoint, images)
    return Rollouts(engine, prompts, options, mesh.dp, _announce_to(teacher))


def _announce_to(teacher: TeacherSource | None) -> OnSample | None:
    """Return the function that lets a teacher begin with one sample; None where it can't score ahead."""
    if teacher is None or not isinstance(teacher, ScoresAhead):
        return None
    begin = teacher.begin
    return lambda sample: begin([sample])

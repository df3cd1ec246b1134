"""The engine of `megatron-gkd generate`: with the weights of the teacher or of the student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from megatron_gkd.config.api_keys import ApiKeyVariable
from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import RolloutEngine
from megatron_gkd.rollout.megatron.engine import MegatronEngine
from megatron_gkd.rollout.vllm.own_weights import OwnWeightsEngine
from megatron_gkd.runtime.hubs import ModelSource
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.build import build_engine, load_model, server_options
from megatron_gkd.training.build_teacher import open_images
from megatron_gkd.training.model_options import generating_options, teacher_options, untrained_student_options
from megatron_gkd.training.setup import Models

Source = Literal["teacher", "student"]


def build_generation_engine(source: Source, recipe: Recipe, mesh: Mesh, models: Models) -> RolloutEngine:
    """Build the engine that generates responses, with the weights of `source` loaded.

    The student has the adapters that it would begin with. Rollout servers get its weights as in training, whatever
    they held before. A teacher's servers generate with the weights that they were started with.
    """
    section = recipe.teacher
    if source == "teacher" and section.source == "server":
        api_key = ApiKeyVariable("teacher.teacher_server_api_key_env", section.teacher_server_api_key_env)
        servers = replace(server_options(recipe, section.teacher_model_server), api_key=api_key)
        return OwnWeightsEngine(mesh, models.student, servers, models.images)
    checkpoint = models.student if source == "student" else models.teachers["teacher"]
    if source == "student" and recipe.lora is not None and recipe.lora.adapters is not None:
        checkpoint = checkpoint.with_adapters(Path(recipe.lora.adapters), "lora.adapters")
    images = open_teachers_images(recipe, checkpoint, models.images) if source == "teacher" else models.images
    is_teacher = source == "teacher"
    options = teacher_options(recipe, "teacher", section) if is_teacher else untrained_student_options(recipe)
    model = load_model(f"the {source} {source_name(recipe, source)}", checkpoint, mesh, generating_options(options))
    if source == "teacher" and recipe.rollout.engine == "vllm_server":  # the servers are the student's
        limit = recipe.rollout.max_batch_tokens
        return MegatronEngine(model, checkpoint.eos_token_ids, images, max_batch_tokens=limit)
    engine = build_engine(recipe, mesh, model, checkpoint, images)
    engine.load_weights(model.named_tensors(), version=0)
    return engine


def open_teachers_images(
    recipe: Recipe, teacher: Checkpoint, students: ImageProcessing | None
) -> ImageProcessing | None:
    """Open what the teacher's processor makes of images; None for a text model, which completes rows of text.

    Args:
        recipe: of the run.
        teacher: reads the student's prompts, which have the tokens of the student's processor.
        students: what that makes of images; None for a text model, whose rows have none.

    Raises:
        UserError: the teacher's makes other tokens or pixels of them.
    """
    own = open_images(recipe, teacher)
    if own is not None and students is not None and own.settings != students.settings:
        raise UserError(
            f"teacher.teacher_model = {recipe.teacher.teacher_model}: its image processor has other settings than that "
            "of student.model, which made the prompts' tokens; a teacher that generates needs the same"
        )
    return own


def source_name(recipe: Recipe, source: Source) -> str:
    """Return the name of the model that generates, as the file's rows have it."""
    teacher = recipe.teacher
    if source == "student":
        model = str(ModelSource.of_student(recipe.student))
        adapters = None if recipe.lora is None else recipe.lora.adapters
    elif teacher.teacher_model is not None:
        model = str(ModelSource.of_teacher(teacher, teacher.teacher_model, recipe.student))
        adapters = teacher.teacher_adapters
    else:
        model, adapters = teacher.teacher_model_server[0], None
    return model if adapters is None else f"{model} with {adapters}"

"""Collect the facts about a run for its report before the first step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from megatron_gkd import __version__
from megatron_gkd.checkpoint_format.adapter_files import count_parameters
from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.config.layout import describe_layout
from megatron_gkd.config.schema import OneTeacher, Recipe, TaggedTeacher
from megatron_gkd.config.vision_rules import PARTS, frozen_parts
from megatron_gkd.models.fusions import describe_fusions
from megatron_gkd.models.moe import count_router_parameters
from megatron_gkd.models.vision.parts import count_parameters_of
from megatron_gkd.ops import passes
from megatron_gkd.reporting.start_report import ModelLine, RowsLine, StartReport
from megatron_gkd.runtime import portability
from megatron_gkd.training.checkpointing.folder import checkpoint_folder

if TYPE_CHECKING:
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import MegatronModel
    from megatron_gkd.training.checkpointing.resume import ResumePoint
    from megatron_gkd.training.setup import Models


_PRECISIONS = {
    "bf16": "bf16 weights and activations, fp32 gradients and optimizer",
    "fp32": "fp32 weights, activations, gradients and optimizer",
}


@dataclass(frozen=True)
class Schedule:
    """The steps of a run.

    Attributes:
        train_iters: number of steps of the whole run.
        epochs: passes over the training rows, by the weights of their files; None where their number is not known.
        point: the checkpoint that the run is resumed from; None for a new run.
    """

    train_iters: int
    epochs: float | None
    point: ResumePoint | None


def describe_start(
    recipe: Recipe,
    models: Models,
    student: MegatronModel,
    rows: Sequence[RowsLine],
    schedule: Schedule,
    adam: str = "",
    ends: str = "",
) -> StartReport:
    """Return the report of a run whose parts are built.

    Args:
        recipe: of the run.
        models: its checkpoints.
        student: the model on this rank.
        rows: the lines of the training and the validation rows.
        schedule: its steps.
        adam: the implementation of the optimizer; see ``adam_name``.
        ends: what ends the student's completions; see `CompletionEnds.describe`.
    """
    parameters = trainable = models.student.num_parameters
    if student.adapters is not None:  # nothing else is trained
        trainable = count_parameters(student.adapters.layers, models.student.parameter_shapes)
    elif models.student.has_images:
        trained, visual_class = set(PARTS) - frozen_parts(recipe.train), student.config.model_meta.visual_cls
        trainable = count_parameters_of(trained, visual_class, models.student.parameter_shapes, parameters)
    if recipe.megatron.freeze_moe_router and student.adapters is None and "llm" not in frozen_parts(recipe.train):
        trainable -= count_router_parameters(student.config, models.student.shape.has_experts_in)
    return StartReport(
        versions={
            "megatron-gkd": __version__,
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        device=portability.device_name(),
        processes=_world_size(),
        nodes=_nodes(),
        layout=_layout(recipe, models),
        precision=_precision(recipe),
        kernels=_kernels(),
        attention=_attention(student, recipe.train.attention_backend),
        fusions=_fusions(student, adam),
        student=ModelLine(
            "student",
            _with_revision(recipe.student.model, models.student),
            models.student.config.model_type,
            parameters,
            trainable=trainable,
        ),
        teachers=_teachers(recipe, models),
        rollouts=_rollouts(recipe),
        rows=rows,
        completions=_completions(recipe, ends),
        train_iters=schedule.train_iters,
        epochs=schedule.epochs,
        first_step=1 if schedule.point is None else schedule.point.step + 1,
        origin=_origin(recipe, schedule.point),
        checkpoints=_checkpoints(recipe),
        output_dir=recipe.output.output_dir,
    )


def _precision(recipe: Recipe) -> str:
    memory = recipe.memory
    if not memory.use_precision_aware_optimizer and memory.main_grads_dtype == "fp32":
        return _PRECISIONS[recipe.train.dtype]
    state = f"{memory.main_params_dtype} weights, {memory.exp_avg_dtype} and {memory.exp_avg_sq_dtype} moments"
    return f"{recipe.train.dtype} weights and activations, {memory.main_grads_dtype} gradients, optimizer with {state}"


def _world_size() -> int:
    return torch.distributed.get_world_size()


def _nodes() -> int | None:
    """Return the number of nodes as torchrun's agent gives it, or as it follows from the ranks of this node."""
    if "GROUP_WORLD_SIZE" in os.environ:
        return int(os.environ["GROUP_WORLD_SIZE"])
    if "LOCAL_WORLD_SIZE" in os.environ:
        return -(-_world_size() // int(os.environ["LOCAL_WORLD_SIZE"]))
    return 1 if _world_size() == 1 else None


def _layout(recipe: Recipe, models: Models) -> dict[str, str]:
    layout = describe_layout(recipe, _world_size())
    if not any(checkpoint.is_moe for checkpoint in (models.student, *models.teachers.values())):
        del layout["experts"]
    return layout


def _kernels() -> str:
    found = passes.implementation(portability.device())
    return "plain torch" if found == "torch" else found


def _attention(student: MegatronModel, attn: str) -> str:
    if student.has_torch_attention:
        return "sdpa (torch)"
    return "flash or fused, as Transformer Engine chooses" if attn == "auto" else f"{attn} (Transformer Engine)"


def _fusions(student: MegatronModel, adam: str) -> str:
    return describe_fusions(student.config) + (f"; optimizer: {adam}" if adam else "")


def _teachers(recipe: Recipe, models: Models) -> list[ModelLine]:
    section = recipe.teacher
    lines = []
    for place, teacher in section.all.items():
        if teacher.source == "none":
            continue
        role = place.removeprefix("teacher.")
        checkpoint = models.teachers.get(place)
        is_shared = recipe.lora is not None and _is_base(teacher, checkpoint, models.student)
        description = ["the student with its adapters off" if is_shared else _place(teacher)]
        if teacher.teacher_cache is not None and teacher.source != "cache":
            description.append(f"for rows that are not in the cache {teacher.teacher_cache}")
        if isinstance(teacher, TaggedTeacher):
            description.append(f"of rows with the tags {', '.join(teacher.tags)}")
        lines.append(
            ModelLine(
                role,
                _with_revision(_name(teacher), checkpoint),
                None if checkpoint is None else checkpoint.config.model_type,
                None if checkpoint is None else checkpoint.num_parameters,
                location=", ".join(description),
            )
        )
    return lines


def _with_revision(name: str, checkpoint: Checkpoint | None) -> str:
    """Return a model's name with the revision that was downloaded, if it was."""
    return name if checkpoint is None or checkpoint.revision is None else f"{name}@{checkpoint.revision}"


def _is_base(teacher: OneTeacher, checkpoint: Checkpoint | None, student: Checkpoint) -> bool:
    if teacher.source == "self":
        return teacher.teacher_model is not None
    return checkpoint is not None and checkpoint.has_weights_of(student)


def _name(teacher: OneTeacher) -> str:
    match teacher.source:
        case "server":
            return ", ".join(teacher.teacher_model_server)
        case "cache" if teacher.teacher_cache is not None:
            return Manifest.read(teacher.teacher_cache).teacher
        case "self":
            return "self"
    model = teacher.teacher_model or ""
    return model if teacher.teacher_adapters is None else f"{model} with {teacher.teacher_adapters}"


def _place(teacher: OneTeacher) -> str:
    match teacher.source:
        case "server":
            return "a vLLM server" if len(teacher.teacher_model_server) == 1 else "vLLM servers"
        case "cache":
            return f"from the cache {teacher.teacher_cache}"
        case "self" if teacher.teacher_ema is not None:
            return f"moving average of the student's weights, decay {teacher.teacher_ema:g}"
        case "self" if teacher.teacher_model is not None:
            return "the student's weights at its start"
        case "self":
            return "the student's own weights, with each row's teacher_prompt"
    return "in host memory between scorings" if teacher.offload_teacher_model else "in device memory"


def _rollouts(recipe: Recipe) -> str | None:
    distill = recipe.distill
    if not distill.lmbda:
        return None
    steps, per_prompt = recipe.steps_per_generation, recipe.rollout.num_generations
    granularity = "generation" if steps > 1 and distill.lmbda_granularity == "step" else distill.lmbda_granularity
    text = f"engine {recipe.rollout.engine}, lmbda {distill.lmbda:g} of each {granularity}"
    if steps > 1 or per_prompt > 1:
        size = steps * recipe.train.global_batch_size
        text += f"; a generation: {size} completions for {steps} step{'s' * (steps > 1)}, {per_prompt} of each prompt"
    return text


def _completions(recipe: Recipe, ends: str) -> str | None:
    if not recipe.distill.lmbda:
        return None
    longest = f"up to {recipe.max_completion_length} tokens after prompts of up to {recipe.max_prompt_length}"
    return f"{longest}, ended by {ends}"


def _origin(recipe: Recipe, point: ResumePoint | None) -> str | None:
    if point is not None:
        return f"resumed from {point.path}"
    if recipe.train.init_from is not None:
        return f"with the weights of {recipe.train.init_from}"
    if recipe.lora is not None and recipe.lora.adapters is not None:
        return f"with the adapters of {recipe.lora.adapters}"
    return None


def _checkpoints(recipe: Recipe) -> str | None:
    output = recipe.output
    if output.save_interval is None:
        return None
    kept = "all kept" if output.save_total_limit is None else f"the newest {output.save_total_limit} kept"
    return f"every {output.save_interval} steps in {checkpoint_folder(recipe).path}, {kept}"

"""The options with which the recipe's models are built."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from megatron_gkd.config.lora_rules import layer_rules
from megatron_gkd.config.schema import LoraSection, OneTeacher, Recipe, TrainSection
from megatron_gkd.config.stages import Stages
from megatron_gkd.config.vision_rules import frozen_parts
from megatron_gkd.models.build_options import BuildOptions
from megatron_gkd.models.lora.options import Initialization, LoraOptions
from megatron_gkd.models.module_options import Fp8Options, ModuleOptions

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_INITIALIZATIONS: dict[str, Initialization] = {"kaiming": "kaiming", "gaussian": "gaussian"}


def student_options(recipe: Recipe) -> BuildOptions:
    """Return the options of the student in training."""
    parallel, section = recipe.parallel, recipe.train
    return BuildOptions(
        dtype=DTYPES[section.dtype],
        attn=section.attention_backend,
        virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers,
        recompute_modules=parallel.recompute_modules,
        stages=Stages.of_student(parallel),
        modules=ModuleOptions.of_student(recipe.megatron),
        moe_aux_loss_coeff=section.moe_aux_loss_coeff,
        lora=None if recipe.lora is None else lora_options(recipe.lora, section),
        frozen=frozen_parts(section),
        recomputes_tower=section.vit_gradient_checkpointing,
    )


def untrained_student_options(recipe: Recipe) -> BuildOptions:
    """Return the options of the student where it only scores or generates.

    It has virtual pipeline stages only where the recipe's keys of the stages count on them.
    """
    stages = Stages.of_student(recipe.parallel)
    virtual = None if stages.are_equal else recipe.parallel.virtual_pipeline_model_parallel_size
    return BuildOptions(
        dtype=DTYPES[recipe.train.dtype],
        attn=recipe.train.attention_backend,
        virtual_pipeline=virtual,
        stages=stages,
        modules=replace(ModuleOptions.of_student(recipe.megatron), is_trained=False, freezes_routers=False),
    )


def generating_options(options: BuildOptions) -> BuildOptions:
    """Return the options of a model that generates, whose steps of few tokens FP8 can't compute."""
    return replace(options, modules=replace(options.modules, fp8=None))


def teacher_options(recipe: Recipe, place: str, teacher: OneTeacher) -> BuildOptions:
    """Return the options of the local teacher at a key of the recipe."""
    fp8 = teacher_fp8(place, teacher)
    return BuildOptions(
        dtype=DTYPES[recipe.train.dtype],
        attn=recipe.train.attention_backend,
        stages=Stages.of_teacher(place, teacher),
        modules=ModuleOptions.of_teacher(recipe.megatron, fp8),
    )


def teacher_fp8(place: str, teacher: OneTeacher) -> Fp8Options | None:
    """Return the FP8 of the local teacher at a key of the recipe; None where it computes in `train.dtype`."""
    chosen = teacher.teacher_fp8_format
    return None if chosen is None else Fp8Options(f"{place}.teacher_fp8_format", chosen, teacher.teacher_fp8_recipe)


def has_fp8_of_student(teacher: OneTeacher, recipe: Recipe) -> bool:
    """Return whether a local teacher is computed in the student's types, so that it may be the student's base."""
    section = recipe.megatron
    formats = teacher.teacher_fp8_format, section.fp8_format
    return formats == (None, None) or (formats[0], teacher.teacher_fp8_recipe) == (formats[1], section.fp8_recipe)


def lora_options(section: LoraSection, train: TrainSection) -> LoraOptions:
    """Return the options of the student's adapters."""
    return LoraOptions(
        rules=layer_rules(section, train),
        dropout=section.lora_dropout,
        initialization=_INITIALIZATIONS[section.init_lora_weights],
        dtype=None if section.lora_dtype is None else DTYPES[section.lora_dtype],
        seed=train.seed,
        adapters=None if section.adapters is None else Path(section.adapters),
    )

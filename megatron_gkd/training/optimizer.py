"""Megatron's optimizer and learning-rate schedule, from the recipe, and one step of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.config.schema import MemorySection, TrainSection
from megatron_gkd.models.vision.parts import Part, named_parts
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.agreement import holds_everywhere
from megatron_gkd.runtime.transformer_engine import fused_adam_importable
from megatron_gkd.training.hybrid_optimizer import install_hybrid_optimizer
from megatron_gkd.training.optimizer_state import adams, optimizer_parts
from megatron_gkd.training.parameter_gather import parameters_gathered_once

from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
"""The types of optimizer state as Megatron-Core names them."""


def build_optimizer(
    chunks: list[nn.Module], train: TrainSection, memory: MemorySection, *, dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    """Build AdamW over DDP-wrapped chunks, with fp32 master weights for bf16 unless `memory` has others.

    Args:
        chunks: this rank's part of the model.
        train: the recipe's section.
        memory: the recipe's section.
        dtype: of the parameters.
        distributed: whether data-parallel ranks share the optimizer's state.
    """
    with contextlib.ExitStack() as stack:
        if memory.use_precision_aware_optimizer and not memory.optimizer_cpu_offload:
            stack.enter_context(fused_adam_importable())
        if memory.optimizer_cpu_offload:
            install_hybrid_optimizer()
        return _build_optimizer(chunks, train, memory, dtype=dtype, distributed=distributed)


def _build_optimizer(
    chunks: list[nn.Module], train: TrainSection, memory: MemorySection, *, dtype: torch.dtype, distributed: bool
) -> MegatronOptimizer:
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=train.min_lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        adam_eps=train.adam_eps,
        clip_grad=train.clip_grad,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed,
        **_memory_options(memory),
    )
    overrides = get_standard_config_overrides(config)
    rates: dict[Part, float | None] = {"vit": train.vit_lr, "aligner": train.aligner_lr}
    for part, rate in rates.items():
        if rate is not None and rate != train.lr:
            overrides |= _group_with_rate(chunks, part, rate, train)
    optimizer = get_megatron_optimizer(config, chunks, config_overrides=overrides, use_gloo_process_groups=False)
    if portability.builds_on_host():
        _update_in_one_pass(optimizer)
    return optimizer


def _update_in_one_pass(optimizer: MegatronOptimizer) -> None:
    """Let torch's AdamW read and write each tensor once, where it does not choose that itself: on a CPU."""
    for adam in adams(optimizer):
        if type(adam) is torch.optim.AdamW:
            for group in adam.param_groups:
                group["fused"] = True


def _memory_options(memory: MemorySection) -> dict[str, Any]:
    """Return the keys of `OptimizerConfig` that decide where the optimizer's state is, and in which types."""
    options: dict[str, Any] = {}
    if memory.optimizer_cpu_offload:
        options |= {"optimizer_cpu_offload": True, "optimizer_offload_fraction": memory.optimizer_offload_fraction}
    if memory.optimizer_cpu_offload or memory.use_precision_aware_optimizer:
        # Megatron's hybrid optimizer has this code path too: otherwise fp32 weights would stay on the device.
        options["use_precision_aware_optimizer"] = True
        for key in ("main_params_dtype", "main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            options[key] = STATE_DTYPES[getattr(memory, key)]
    return options


def base_learning_rate(optimizer: MegatronOptimizer) -> float:
    """Return the learning rate of the next update, if possible of parameters without a rate of their own."""
    groups = optimizer.param_groups
    return max(group["lr"] for group in [one for one in groups if one["default_config"]] or groups)


def _group_with_rate(
    chunks: Iterable[nn.Module], part: Part, rate: float, train: TrainSection
) -> dict[ParamKey, dict[str, float]]:
    """Return Megatron's override that gives a part of the model its own learning rate, on the schedule of `train.lr`.

    A loaded checkpoint's groups are recognized by `lr_mult` among others, and not by the rates (Megatron-Core 0.16.1
    and 0.19.2, `param_group_identifier_keys`): without it the part's group would get the rates of another.
    """
    members = {id(parameter) for chunk in chunks for own, parameter in named_parts(chunk) if own == part}
    ratio = rate / train.lr
    predicate = ParamPredicate(name=part, fn=lambda parameter: id(parameter) in members)
    return {ParamKey(predicate=predicate): {"max_lr": rate, "min_lr": train.min_lr * ratio, "lr_mult": ratio}}


def step_if_finite(optimizer: MegatronOptimizer) -> float:
    """Clip the gradient and update the parameters, unless the gradient norm is not finite. All ranks must call it.

    Megatron's own `step` multiplies by a NaN norm: `nan > clip_grad` is false, which turns clipping off.

    Returns:
        The gradient norm before clipping; NaN on every rank if it is not finite on any, in which case the parameters
        and the optimizer's state do not change.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    if not holds_everywhere(math.isfinite(norm)):
        return math.nan
    clip_grad = optimizer.config.clip_grad
    if clip_grad > 0:
        for part in optimizer_parts(optimizer):
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters:
                is_decoupled = part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8
                clip_grad_by_total_norm_fp32(parameters, clip_grad, norm, is_decoupled)
    with parameters_gathered_once(optimizer):
        optimizer.step_with_ready_grads()
    return norm


def build_scheduler(optimizer: MegatronOptimizer, train: TrainSection, train_iters: int) -> OptimizerParamScheduler:
    """Build a linear warm-up to `lr` and a decay to `min_lr` at step `train_iters`, in the style of `train`."""
    if train.lr_warmup_fraction is not None:
        warmup = int(train.lr_warmup_fraction * train_iters)
    else:
        warmup = train.lr_warmup_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.lr,
        min_lr=train.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(train_iters, warmup + 1),
        lr_decay_style=train.lr_decay_style,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=False,
    )

"""Updates of optimizers on the meta device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime.meta_device.assumptions import current

from megatron.core.optimizer import clip_grads


def allow_fused_updates() -> None:
    """Let torch take its fused updates of tensors on the meta device, as it does of those in host memory."""
    module: Any = importlib.import_module("torch.optim.optimizer")  # `torch.optim` hides it
    supported = module._get_fused_kernels_supported_devices
    module._get_fused_kernels_supported_devices = lambda: [*supported(), "meta"]
    clip_grads.multi_tensor_scale_impl = _scale


def _scale(chunk_size: int, flag: Tensor, tensors: list[list[Tensor]], factor: Any) -> None:
    """Scale gradients as the kernels of Transformer Engine and apex do, in place; torch needs a copy of the largest."""
    if not current().fused_optimizer:
        _copy = torch.empty_like(max(tensors[0], key=Tensor.numel))


def allocate_like_kernels(adam: Any) -> None:
    """Replace an Adam's update, once it has its state, by one that allocates what the kernels of a GPU do.

    Those of Transformer Engine allocate nothing. torch's updates all parameters at once, with a copy of a moment.
    """

    def step(*args: Any, **options: Any) -> None:
        if not current().fused_optimizer:
            _copies = [torch.empty_like(moment) for moment in _second_moments(adam)]

    adam.step = step


def _second_moments(adam: Any) -> Iterator[Tensor]:
    for state in adam.state.values():
        if "exp_avg_sq" in state:
            yield state["exp_avg_sq"]

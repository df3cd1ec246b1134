"""What Megatron's optimizers hold: their Adams, and the tensors of those on the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer


def optimizer_parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return Megatron's optimizers, of dense parameters and of experts; some ranks have none of a kind."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


def adams(optimizer: MegatronOptimizer) -> Iterator[Any]:
    """Yield the optimizers that update parameters, each of torch, Transformer Engine, apex or Megatron's hybrid."""
    for part in optimizer_parts(optimizer):
        adam = getattr(part, "optimizer", None)
        if adam is not None and not getattr(part, "is_stub_optimizer", False):
            yield adam


def state_tensors(optimizer: MegatronOptimizer) -> Iterator[Tensor]:
    """Yield the parameters of every Adam and the tensors of its state that are on the device, but for single numbers.

    Without the distributed optimizer, and for fp32 weights, some are the model's own parameters.
    """
    for adam in adams(optimizer):
        if isinstance(adam, HybridDeviceOptimizer):
            adam = adam.gpu_optimizer
        if adam is None:
            continue
        owners = [parameter for group in adam.param_groups for parameter in group["params"]]
        values = [value for owner in owners for value in adam.state.get(owner, {}).values()]
        for tensor in (*owners, *values):
            if isinstance(tensor, Tensor) and tensor.dim():
                yield getattr(tensor, "_data", tensor).data  # Transformer Engine's FP8 tensors hold their bytes there


def adam_name(optimizer: MegatronOptimizer) -> str:
    """Return which Adam updates the parameters of this rank, for the report of a run's start."""
    names = sorted({_name(adam) for adam in adams(optimizer)})
    return ", ".join(names) or "none (this rank trains no parameters)"


def _name(adam: Any) -> str:
    if isinstance(adam, HybridDeviceOptimizer):
        share = f"{adam.offload_fraction:.0%} of the parameters in host memory"
        on_device = "" if adam.gpu_optimizer is None else f", {_name(adam.gpu_optimizer)} on the device"
        return f"torch's AdamW for {share}{on_device}"
    library = type(adam).__module__.partition(".")[0]
    if library == "megatron_gkd":
        return "the PyTorch fallback of Transformer Engine's FusedAdam"
    if isinstance(adam, torch.optim.Adam):
        return "torch's AdamW"
    return {"transformer_engine": "Transformer Engine's FusedAdam", "apex": "apex's FusedAdam"}.get(
        library, type(adam).__name__
    )

"""Norms that keep for their backward pass what Transformer Engine's do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime.meta_device.assumptions import current
from megatron_gkd.runtime.transformer_engine import linear, norm


def replace_norms() -> None:
    """Replace the norms of all layers where the run is assumed to have Transformer Engine's."""
    in_torch = norm.normalize

    def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str, **options: Any) -> Tensor:
        if current().fused_norms:
            out: Tensor = _FusedNorm.apply(x, weight, bias)
            return out
        return in_torch(x, weight, bias, eps, kind, **options)

    norm.normalize = linear.normalize = normalize


class _FusedNorm(torch.autograd.Function):
    """Keeps the input and one fp32 number a row (two of LayerNorm)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        numbers = 1 if bias is None else 2
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, x.new_empty((numbers, *x.shape[:-1]), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight) if ctx.has_bias else None

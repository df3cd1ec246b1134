"""Norms whose gradients are right under sequence parallelism.

Their weights see only this rank's tokens, so they carry the mark by which Megatron sums their gradients over the ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from megatron_gkd.runtime import portability

from megatron.core.transformer.transformer_config import TransformerConfig


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, chosen by `config.normalization`; statistics in fp32.

    Attributes:
        zero_centered_gamma: whether the weight is gamma less one; callers may change it after building.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.kind = eps, config.normalization
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        gamma = torch.full((hidden_size,), 0.0 if self.zero_centered_gamma else 1.0, dtype=config.params_dtype)
        self.weight = new_parameter(gamma, sequence_parallel=config.sequence_parallel)
        self.bias: nn.Parameter | None = None
        if self.kind == "LayerNorm":
            beta = torch.zeros(hidden_size, dtype=config.params_dtype)
            self.bias = new_parameter(beta, sequence_parallel=config.sequence_parallel)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [..., H], normalized, in its dtype."""
        return normalize(x, self.weight, self.bias, self.eps, self.kind, zero_centered_gamma=self.zero_centered_gamma)


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    kind: str,
    *,
    zero_centered_gamma: bool,
) -> torch.Tensor:
    """Return x [..., H], normalized, in its dtype.

    Args:
        x: the input.
        weight: [H], gamma, less one where it is centered at zero.
        bias: [H] for LayerNorm, otherwise None.
        eps: added to the variance or mean square.
        kind: "RMSNorm" or "LayerNorm".
        zero_centered_gamma: whether `weight` is centered at zero.
    """
    gamma = weight + 1 if zero_centered_gamma else weight
    if kind == "LayerNorm":
        return F.layer_norm(x, x.shape[-1:], gamma, bias, eps)
    if has_fewer_passes(x, gamma):
        return _RmsNorm.apply(x, gamma, eps)
    return gamma * F.rms_norm(x.float() if x.dtype != torch.float64 else x, x.shape[-1:], eps=eps).to(x.dtype)


def has_fewer_passes(x: torch.Tensor, gamma: torch.Tensor) -> bool:
    """Return whether `_RmsNorm` takes fewer passes than torch: in fp32 on a CPU."""
    return portability.builds_on_host() and x.dtype == gamma.dtype == torch.float32


class _RmsNorm(torch.autograd.Function):
    """RMSNorm in fp32 in few passes; torch has a kernel of its own for it on GPUs alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gamma: torch.Tensor, eps: float) -> torch.Tensor:
        factor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, gamma, factor)
        return (x * factor).mul_(gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, gamma, factor = ctx.saved_tensors
        size = x.shape[-1]
        normed = x * factor
        by_gamma = gradient * normed
        mean = (by_gamma @ gamma).div_(size).unsqueeze_(-1)
        by_x = (gradient * gamma).addcmul_(normed, mean, value=-1).mul_(factor)
        return by_x, by_gamma.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None, None


def new_parameter(data: torch.Tensor, **attributes: Any) -> nn.Parameter:
    """Return a parameter with the attributes by which Megatron decides how to reduce and save it."""
    parameter = nn.Parameter(data)
    for name, value in attributes.items():
        setattr(parameter, name, value)
    return parameter


class TENorm:
    """Build a `Norm`, as Megatron's factory of this name does.

    `has_residual` offers a fusion (Megatron-Core 0.19), which the fallback does not use.
    """

    def __new__(  # type: ignore[misc]  # a factory in the shape of a class, as upstream
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, has_residual: bool = False
    ) -> Norm:
        """Return the norm."""
        return Norm(config, hidden_size, eps)

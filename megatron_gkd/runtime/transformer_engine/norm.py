"""Norms that know sequence parallelism.

Their weights see only this rank's tokens, so they carry the mark by which Megatron sums their gradients over the ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dimension, chosen by `config.normalization`; statistics in fp32."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        self.eps, self.kind = eps, config.normalization
        shift = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.gamma_offset = shift
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - shift, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        self.bias = None
        if self.kind == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
            self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalize(x, self.weight, self.bias, self.eps, self.kind, self.gamma_offset)


def normalize(x, weight, bias, eps: float, kind: str, gamma_offset: float = 0.0) -> torch.Tensor:
    """[..., H] -> [..., H] in the input's dtype."""
    gamma = weight + gamma_offset if gamma_offset else weight
    if kind == "LayerNorm":
        return F.layer_norm(x, x.shape[-1:], gamma, bias, eps)
    return gamma * F.rms_norm(x.float() if x.dtype != torch.float64 else x, x.shape[-1:], eps=eps).to(x.dtype)


class TENorm:
    """Megatron's factory of the same name; `has_residual` only offers a fusion (Megatron-Core 0.19)."""

    def __new__(cls, config, hidden_size: int, eps: float = 1e-5, has_residual: bool = False):
        return Norm(config, hidden_size, eps)

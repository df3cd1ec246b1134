"""The gated delta rule of linear attention, whose kernels need a GPU and whose form in torch loops over tokens.

Shapes: b batch, s tokens, h heads, d size of a key, e size of a value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_gkd.runtime.gated_delta_rule import replace_in_models
from megatron_gkd.runtime.meter import record_flops

_CHUNK = 64
"""Tokens that flash-linear-attention's kernels compute together."""


def replace_delta_rule() -> None:
    """Replace the rule for the rest of the process."""
    replace_in_models(_chunk_gated_delta_rule)


def _chunk_gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: Any
) -> tuple[Tensor, None]:
    out: Tensor = _DeltaRule.apply(query, key, value, g, beta)
    return out, None


class _DeltaRule(torch.autograd.Function):
    """Keeps its inputs, and the inverse of each chunk's lower triangle [b, s, h, chunk]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        batch, tokens, heads, size = query.shape
        ctx.save_for_backward(query, key, value, g, beta, query.new_empty(batch, tokens, heads, _CHUNK))
        # Within a chunk four products of [chunk, chunk] by [chunk, d or e]; with the state four of [chunk, d] by [d, e]
        within = 4 * _CHUNK * (size + value.shape[-1]) / 2
        ctx.flops = 2.0 * batch * tokens * heads * (within + 4 * size * value.shape[-1])
        record_flops(ctx.flops)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        record_flops(2.5 * ctx.flops)
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:5])

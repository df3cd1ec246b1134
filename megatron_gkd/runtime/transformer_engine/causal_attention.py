"""Causal attention on torch's scaled_dot_product_attention, with sliding windows and attention sinks.

Shapes: b batch, h query heads, g key/value heads, s queries, t keys, d size of a query and a key, e size of a value.
The last query is aligned to the last key, as context parallelism and decoding with a cache need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

_WINDOW_BLOCK = 512  # queries that attend together under a window, so that a mask has no s * t elements
_SINK_WIDTH = 8  # fused kernels want sizes that are multiples of 8


@dataclass(frozen=True)
class CausalAttention:
    """The causal attention of one layer.

    Attributes:
        scale: factor of the scores; None for 1 / sqrt(d).
        window: number of newest keys that a query sees, its own included; None for all.
        sinks: [h] or [h,s], the score of a key that all queries of a head see and whose value is zero; None without.
    """

    scale: float | None = None
    window: int | None = None
    sinks: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
        """Return [b,h,s,e] for q [b,h,s,d], k [b,g,t,d] and v [b,g,t,e]."""
        num_queries, num_keys = q.shape[2], k.shape[2]
        if self.window is None or num_keys <= self.window:
            return self.attend(q, k, v, None, dropout_p)
        outputs = []
        for start in range(0, num_queries, _WINDOW_BLOCK):
            block = q[:, :, start : start + _WINDOW_BLOCK]
            end = num_keys - num_queries + start + block.shape[2]
            first = max(0, end - block.shape[2] - self.window + 1)
            visible = _band(block.shape[2], end - first, self.window, q.device)
            outputs.append(self.attend(block, k[:, :, first:end], v[:, :, first:end], visible, dropout_p))
        return torch.cat(outputs, dim=2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, dropout_p: float = 0.0) -> Tensor:
        """Return [b,h,s,e] like `__call__`, with a mask in place of the window.

        Args:
            q: [b,h,s,d].
            k: [b,g,t,d].
            v: [b,g,t,e].
            visible: bool, broadcast to [b,h,s,t]: the keys that a query sees; None for all up to its own.
            dropout_p: probability at which a weight is dropped.
        """
        scale, size = self.scale or 1 / math.sqrt(q.shape[-1]), v.shape[-1]
        if self.sinks is not None:
            q, k, v = _prepend_sink(q, k, v, self.sinks / scale)
            visible = None if visible is None else F.pad(visible, (1, 0), value=True)
        mask: Tensor | CausalBias | None = visible
        is_causal = visible is None and q.shape[2] == k.shape[2]
        if visible is None and not is_causal:
            mask = causal_lower_right(q.shape[2], k.shape[2])
        out = scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out[..., :size]


def _band(num_queries: int, num_keys: int, window: int, device: torch.device) -> Tensor:
    """Return bool [s,t], true at the `window` newest keys of each query."""
    ages = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None] - torch.arange(
        num_keys, device=device
    )
    return (ages >= 0) & (ages < window)


def _prepend_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give every query a further element, and put before all keys one that has a one there alone, of value zero.

    Its score is the query's further element, that of its head in sinks [h] or [h,s]; other keys have a zero there. An
    additive mask would do as well, but it has h * s * t elements, and fused kernels do not take its gradient.
    """
    further = sinks.to(q.dtype).view(1, q.shape[1], -1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    q = torch.cat([q, F.pad(further, (0, _SINK_WIDTH - 1))], dim=-1)
    size = k.shape[-1]
    k = F.pad(k, (0, _SINK_WIDTH, 1, 0))
    k[:, :, 0, size] = 1.0
    return q, k, F.pad(v, (0, k.shape[-1] - v.shape[-1], 1, 0))

"""The core of attention, which keeps what the kernels of a GPU do and reports its FLOPs.

Shapes: s tokens of this rank, h query heads, g key/value heads, d size of a query and a key, e size of a value.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.meta_device.assumptions import current
from megatron_gkd.runtime.meter import record_flops, record_sends
from megatron_gkd.runtime.transformer_engine import attention, causal_attention, needs_torch_attention
from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

BACKWARD = 2.5
"""FLOPs of the backward pass by those of the forward pass: the scores are computed again, and four products follow."""


def replace_core() -> None:
    """Replace the core of attention for the rest of the process."""
    in_torch = TEDotProductAttention.forward

    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Tensor:
        if options.get("packed_seq_params") is None or not _is_fused(self):
            return in_torch(self, q, k, v, *args, **options)
        flops = _flops(self, q, v, options["packed_seq_params"])
        out: Tensor = _Fused.apply(q, k, v, self.softmax_offset, self.cp_group, flops)
        return out.flatten(1)

    TEDotProductAttention.forward = forward  # type: ignore[method-assign]
    _put_order_on_device()
    module: Any = causal_attention
    module.scaled_dot_product_attention = _flash
    module.causal_lower_right = lambda queries, keys: None  # a tensor's subclass, which needs memory


def _put_order_on_device() -> None:
    """Let the fallback index with tensors on the meta device: boundaries of sequences, which have values, are not."""
    from_boundaries = attention._Packing._from_boundaries

    def on_device(cu_seqlens: Tensor, cp_group: Any) -> Any:
        packing = from_boundaries(cu_seqlens, cp_group)
        order = packing.sequence_order
        return replace(packing, sequence_order=None if order is None else order.to(portability.device()))

    attention._Packing._from_boundaries = staticmethod(on_device)  # type: ignore[method-assign]


def _is_fused(core: Any) -> bool:
    """Return whether the run would have Transformer Engine's attention in a layer."""
    config = core.config
    has_kernel = config.params_dtype != torch.float32 and not needs_torch_attention("auto", config)
    return has_kernel and current().fused_attention


def _flops(core: Any, q: Tensor, v: Tensor, packing: Any) -> float:
    """Return the FLOPs of a forward pass on this rank: of causal attention, half of all products of whole sequences."""
    boundaries = packing.cu_seqlens_q.tolist()
    pairs = sum(_pairs(end - start, core.window) for start, end in pairwise(boundaries)) / core.cp_group.size()
    return 2.0 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


def _pairs(length: int, window: int | None) -> float:
    """Return the number of pairs of a query and a key that it sees, in one sequence."""
    seen = min(length, window or length)
    return seen * (seen + 1) / 2 + (length - seen) * seen


class _Fused(torch.autograd.Function):
    """Transformer Engine's attention: keeps q, k, v, the output, and one fp32 number for each query and head.

    Context-parallel ranks send their keys and values around a ring, and their gradients with them in backward.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, group: Any, flops: float) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[2])
        ctx.save_for_backward(q, k, v, sinks, out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32))
        ctx.group, ctx.flops = group, flops
        record_flops(flops)
        _ring(k, v, group, rounds=group.size() - 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, _, _ = ctx.saved_tensors
        record_flops(BACKWARD * ctx.flops)
        _ring(k, v, ctx.group, rounds=2 * ctx.group.size() - 1)
        gradients = [torch.empty_like(one) for one in (q, k, v)]
        return *gradients, None if sinks is None else torch.empty_like(sinks), None, None


def _ring(k: Tensor, v: Tensor, group: Any, rounds: int) -> None:
    """Allocate the buffers of a ring, one to send and one to receive, and report the messages."""
    if group.size() > 1:
        size = k.nbytes + v.nbytes
        _buffers = k.new_empty(2 * size, dtype=torch.uint8)
        record_sends(group, size, rounds)


def _flash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any = None,
    dropout_p: float = 0.0,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Replace torch's function of this signature by its flash kernel, which the meta device would not choose."""
    queries, keys = q.shape[2], k.shape[2]
    pairs = queries * (keys - (queries - 1) / 2) if mask is None or not isinstance(mask, Tensor) else queries * keys
    flops = 2.0 * pairs * q.shape[1] * (q.shape[3] + v.shape[3])
    out, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, dropout_p, is_causal, scale=scale)
    result: Tensor = _Recorded.apply(out, flops)
    return result


class _Recorded(torch.autograd.Function):
    """Returns its input, and reports the FLOPs of the attention that it comes from."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, flops: float) -> Tensor:
        ctx.flops = flops
        record_flops(flops)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        record_flops(BACKWARD * ctx.flops)
        return grad, None

"""Rotary position embeddings on a CPU in two passes over queries and keys, where Megatron's plain torch makes six."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotate_in_two_passes() -> None:
    """Replace Megatron's unfused rotation. Call it once, after mcore-bridge is imported."""
    from megatron.core.models.common.embeddings import rope_utils

    rope_utils._apply_rotary_pos_emb_bshd = _rotating(rope_utils._apply_rotary_pos_emb_bshd)


def _rotating(original: Callable) -> Callable:
    @functools.wraps(original)
    def apply(
        t: Tensor,
        freqs: Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
        **options: Any,
    ) -> Tensor:
        if rotary_interleaved or multi_latent_attention or options:
            return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale, **options)
        return _Rotation.apply(t, *_factors(freqs, mscale, t.dtype))

    return apply


def _factors(freqs: Any, mscale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, computed once for all layers of a microbatch."""
    key = mscale, dtype
    found = getattr(freqs, "rotation_factors", None)
    if found is None or found[0] != key:
        found = key, ((torch.cos(freqs) * mscale).to(dtype), (torch.sin(freqs) * mscale).to(dtype))
        freqs.rotation_factors = found
    return found[1]


class _Rotation(torch.autograd.Function):
    """Rotate the first d elements of each head of t [s, b, h, D] by cosines and sines [s, b, 1, d]."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        (cos1, cos2), (sin1, sin2) = cosines.chunk(2, -1), sines.chunk(2, -1)
        return _rotate(t, cosines.shape[-1], (cos1, sin1, -1), (cos2, sin2, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        (cos1, cos2), (sin1, sin2) = cosines.chunk(2, -1), sines.chunk(2, -1)
        return _rotate(gradient, cosines.shape[-1], (cos1, sin2, 1), (cos2, sin1, -1)), None, None


_Factors = tuple[Tensor, Tensor, int]
"""Factors of a half and of the other one, and the sign of the latter's."""


def _rotate(t: Tensor, size: int, of_first: _Factors, of_second: _Factors) -> Tensor:
    """Return t [..., D] with both halves of its first `size` elements combined."""
    out = torch.empty(t.shape, dtype=t.dtype, device=t.device)
    half = size // 2
    first, second = t[..., :half], t[..., half:size]
    for own, other, rotated, (cos, sin, sign) in (
        (first, second, out[..., :half], of_first),
        (second, first, out[..., half:size], of_second),
    ):
        torch.mul(own, cos, out=rotated)
        rotated.addcmul_(other, sin, value=sign)
    if size < t.shape[-1]:
        out[..., size:] = t[..., size:]
    return out

"""The gated delta rule of linear attention (Qwen3-Next, Qwen3.5) in torch, where flash-linear-attention is absent.

Megatron-Core refuses to build a delta net without that library, whose kernels need a GPU, and mcore-bridge refuses
packed sequences. Both find what they miss here. Shapes: b batch, s tokens, h heads, d size of a key, e size of a value;
packed sequences have b = 1 and are delimited by `cu_seqlens`, int32 [sequences + 1].
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install_gated_delta_rule() -> bool:
    """Put these functions in the places of flash-linear-attention's. Return False where that library is installed."""
    if importlib.util.find_spec("fla") is not None:
        return False
    replace_in_models(chunk_gated_delta_rule)
    return True


def replace_in_models(rule: Callable[..., tuple[Tensor, None]]) -> None:
    """Let the models compute with `rule`, of the signature of `chunk_gated_delta_rule`, and with this file's functions.

    Models of this process that are built already do so, too.
    """
    from mcore_bridge.model.modules import gated_delta_net as of_bridge
    from megatron.core.ssm import gated_delta_net as of_megatron

    for module in (of_megatron, of_bridge):
        module.l2norm, module.chunk_gated_delta_rule = l2norm, rule
    of_bridge.causal_conv1d, of_megatron.HAVE_FLA = causal_conv1d, True


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Return x [..., d] divided by its norm."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, None]:
    """Convolve each channel over its newest tokens.

    Args:
        x: [b, s, channels].
        weight: [channels, tokens], the newest token's last.
        bias: [channels].
        activation: "silu" or "swish", which is the same.
        cu_seqlens: where packed sequences start and end; None for one sequence a row.

    Returns:
        [b, s, channels], and no state, which decoding would go on from.
    """
    if activation not in ("silu", "swish"):
        raise ValueError(f"activation = {activation}: not supported; silu and swish are")
    width = weight.shape[1]
    convolved = [
        F.conv1d(F.pad(one.transpose(1, 2), (width - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
        for one in _split(x, cu_seqlens)
    ]
    return F.silu(torch.cat(convolved, dim=2)).transpose(1, 2), None


def chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Apply Megatron's torch implementation, which knows no packed sequences, to one sequence after another.

    Args:
        query: [b, s, h, d].
        key: [b, s, h, d].
        value: [b, s, h, e].
        g: [b, s, h], the logarithm of the decay of the state.
        beta: [b, s, h], how much of a token's value is written.
        cu_seqlens: where packed sequences start and end; None for one sequence a row.
        options: of Megatron's function.

    Returns:
        [b, s, h, e], and no state, which decoding would go on from.
    """
    from megatron.core.ssm.gated_delta_net import torch_chunk_gated_delta_rule

    sequences = zip(*(_split(x, cu_seqlens) for x in (query, key, value, g, beta)), strict=True)
    outputs = [torch_chunk_gated_delta_rule(q, k, v, g=a, beta=b, **options)[0] for q, k, v, a, b in sequences]
    return torch.cat(outputs, dim=1), None


def _split(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Split x [1, s, ...] into its sequences, without empty ones."""
    if cu_seqlens is None:
        return [x]
    return [sequence for sequence in x.split(cu_seqlens.diff().tolist(), dim=1) if sequence.shape[1]]

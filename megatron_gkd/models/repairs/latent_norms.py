"""The norms of latent attention have an epsilon of their own, which Megatron-Core takes from the other norms."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

_EPS = 1e-6
"""In transformers and in DeepSeek's code, whatever `rms_norm_eps` is: GLM-4.7 has 1e-5 there."""


def set_latent_norm_eps(chunk: nn.Module) -> None:
    """Set the epsilon of the norms before the up projections, which are fused with these or modules of their own."""
    for attention in chunk.modules():
        if isinstance(attention, MultiLatentAttention):
            for name in ("q_layernorm", "kv_layernorm", "linear_q_up_proj", "linear_kv_up_proj"):
                module: Any = getattr(attention, name, None)
                if hasattr(module, "eps"):
                    module.eps = _EPS

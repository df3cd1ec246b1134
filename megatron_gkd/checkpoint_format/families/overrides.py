"""Settings of Megatron's models that several families derive in one way.

Each function takes the configuration of a language model as transformers completes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_gkd.checkpoint_format.config_values import Config, has_experts_in


def pattern(flags: Iterable[bool]) -> str:
    """Return a setting by layer as mcore-bridge reads it: `[0,1,1]`."""
    return f"[{','.join(str(int(flag)) for flag in flags)}]"


def windows_by_layer_type(config: Config) -> dict[str, Any]:
    """Return the settings of attention windows in the layers that `layer_types` names `sliding_attention`."""
    is_windowed = [kind == "sliding_attention" for kind in config.get("layer_types") or ()]
    if not any(is_windowed):
        return {}
    # Megatron counts the tokens before the own one
    return {"window_size": f"{config['sliding_window'] - 1},0", "window_attn_skip_freq": pattern(is_windowed)}


def windows_everywhere(config: Config) -> dict[str, Any]:
    """Return the settings of attention windows in all layers, where there is a window."""
    return {"window_size": f"{config['sliding_window'] - 1},0"} if config.get("sliding_window") else {}


def mixed_layers(config: Config) -> dict[str, Any]:
    """Return the settings of a mixture of experts in some layers, and of the dense layers between them."""
    flags = has_experts_in(config)
    return {} if all(flags) else {"moe_layer_freq": pattern(flags), "ffn_hidden_size": config["intermediate_size"]}


def sigmoid_router(_: Config) -> dict[str, Any]:
    """Return the settings of a router with sigmoid scores and a correction bias for each expert."""
    return {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

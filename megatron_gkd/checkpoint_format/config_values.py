"""Read values of a model's config.json that families name differently or leave out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Config = Mapping[str, Any]
"""The content of config.json, or of the part of it that describes the language model."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence length, which differs between packed rows."""

_EXPERTS = ("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "num_shared_expert", "moe_num_shared_experts")
_SHARED_SIZES = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")


def text_config(config: Config) -> Config:
    """Return what describes the language model: `text_config` over the rest, which multimodal models have."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def expert_key(config: Config) -> str | None:
    """Return the key with the number of experts of a language model, None if there is none."""
    return next((key for key in _EXPERTS if config.get(key) is not None), None)


def num_experts(config: Config) -> int:
    """Return the number of experts of a language model, 0 for a dense one."""
    key = expert_key(config)
    return 0 if key is None else int(config[key])


def expert_size(config: Config) -> int:
    """Return the rows of one expert's first matrix, without its gate."""
    found: int = config.get("moe_intermediate_size") or config["intermediate_size"]
    return found


def shared_expert_size(config: Config) -> int:
    """Return the rows of the experts that see every token, as one matrix; 0 if there are none."""
    for key in _SHARED_SIZES:
        if config.get(key):
            return int(config[key])
    count = next((config[key] for key in _SHARED_EXPERTS if config.get(key)), 0)
    return int(count) * expert_size(config)


def has_experts_in(config: Config) -> list[bool]:
    """Return for each layer of a language model whether it is a mixture of experts."""
    layers = range(config["num_hidden_layers"])
    if not num_experts(config):
        return [False for _ in layers]
    if config.get("mlp_layer_types"):
        return [kind == "sparse" for kind in config["mlp_layer_types"]]
    if config.get("first_k_dense_replace") is not None:
        return [layer >= config["first_k_dense_replace"] for layer in layers]
    step = config.get("decoder_sparse_step") or config.get("interleave_moe_layer_step") or 1
    dense = config.get("mlp_only_layers") or ()
    return [(layer + 1) % step == 0 and layer not in dense for layer in layers]


def has_latent_attention(config: Config) -> bool:
    """Return whether keys and values come from a latent vector (multi-latent attention)."""
    return config.get("kv_lora_rank") is not None


def num_key_value_heads(config: Config) -> int:
    """Return the number of groups of attention heads that share keys and values."""
    if has_latent_attention(config):
        return int(config["num_attention_heads"])
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def rope(config: Config) -> Config:
    """Return the parameters of the rotary embedding, under whichever key this release of transformers wrote them."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_type(config: Config) -> str:
    """Return how the rotary embedding is scaled to longer sequences, one of ROPE_TYPES in a supported model."""
    found: str = rope(config).get("rope_type", rope(config).get("type", "default"))
    return "default" if found == "mrope" else found  # several positions for each token, as older files name it


def refuse(config: Config, key: str, why: str) -> str:
    """Return the line that names a key of config.json, its value and why it is not supported."""
    value = json.dumps(config.get(key))
    return f"its config.json has {key} = {value if len(value) <= 80 else value[:77] + '...'}: {why}"


def allow_only(config: Config, **allowed: Any) -> Iterator[str]:
    """Yield a line for each key whose value is neither absent, nor null, nor the one that is allowed."""
    for key, value in allowed.items():
        if config.get(key) not in (None, value):
            yield refuse(config, key, f"is not supported; must be {json.dumps(value)}")

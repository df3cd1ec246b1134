"""Dense families of language models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_gkd.checkpoint_format.config_values import Config, allow_only, refuse
from megatron_gkd.checkpoint_format.families.family import Family, PlainLayers
from megatron_gkd.checkpoint_format.families.overrides import pattern, windows_by_layer_type, windows_everywhere
from megatron_gkd.checkpoint_format.families.rules import no_attention_bias

_WINDOWS = ("full_attention", "sliding_attention")
_UNREGISTERED = "mcore-bridge's plain model, since it has no entry of its own"


def _mistral(config: Config) -> dict[str, Any]:
    return {"mcore_model_type": "gpt", "add_qkv_bias": False, **windows_everywhere(config)}


def _no_mixed_windows(config: Config) -> Iterator[str]:
    if config.get("layer_types"):
        yield refuse(config, "layer_types", "is not supported; transformers' Mistral has one window for all layers")


def _seed_oss(config: Config) -> Iterator[str]:
    yield from allow_only(config, attention_bias=True, attention_out_bias=False, mlp_bias=False)


def _smollm3(config: Config) -> dict[str, Any]:
    has_rope = config["no_rope_layers"]
    skipped = {} if all(has_rope) else {"no_rope_freq": pattern(not one for one in has_rope)}
    return {"mcore_model_type": "gpt", **windows_by_layer_type(config), **skipped}


DENSE = (
    Family("llama", ("LlamaForCausalLM",), refuses=no_attention_bias, layers=PlainLayers(), takes_lora=True),
    Family(
        "qwen2",
        ("Qwen2ForCausalLM",),
        overrides=windows_by_layer_type,
        layers=PlainLayers(has_qkv_bias=True),
        layer_types=_WINDOWS,
        takes_lora=True,
    ),
    Family(
        "qwen3",
        ("Qwen3ForCausalLM",),
        overrides=windows_by_layer_type,
        refuses=no_attention_bias,
        layers=PlainLayers(has_qk_norm=True),
        head_dim=128,
        layer_types=_WINDOWS,
        takes_lora=True,
    ),
    Family(
        "ernie4_5",
        ("Ernie4_5ForCausalLM",),
        refuses=lambda config: allow_only(config, use_bias=False),
        layers=PlainLayers(),
        head_dim=128,
        is_tied=True,
        takes_lora=True,
    ),
    Family("glm4", ("Glm4ForCausalLM",), head_dim=128, has_partial_rope=True),
    Family(
        "mistral",
        ("MistralForCausalLM",),
        overrides=_mistral,
        refuses=_no_mixed_windows,
        needs=_UNREGISTERED,
        layers=PlainLayers(),
        takes_lora=True,
    ),
    Family(
        "seed_oss",
        ("SeedOssForCausalLM",),
        overrides=lambda _: {"mcore_model_type": "gpt", "attention_dropout": 0.0},  # and no residual dropout
        refuses=_seed_oss,
        needs=_UNREGISTERED,
        layers=PlainLayers(has_qkv_bias=True),
        head_dim=128,
        takes_lora=True,
    ),
    Family(
        "smollm3",
        ("SmolLM3ForCausalLM",),
        overrides=_smollm3,
        refuses=no_attention_bias,
        needs=_UNREGISTERED,
        layers=PlainLayers(),
        is_tied=True,
        layer_types=_WINDOWS,
        takes_lora=True,
    ),
)
"""The dense families."""

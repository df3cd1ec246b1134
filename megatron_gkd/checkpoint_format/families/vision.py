"""Families of models that read images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_gkd.checkpoint_format.config_values import Config, allow_only, refuse
from megatron_gkd.checkpoint_format.families.family import Family
from megatron_gkd.checkpoint_format.families.overrides import mixed_layers, pattern, sigmoid_router
from megatron_gkd.checkpoint_format.families.rules import groups_of_experts, no_attention_bias, normalized_router

_DECODER = "model.language_model.layers"
_INTERN_MODELS = ("qwen2", "qwen3")
_BLANK_IMAGE = 336  # the side of the image that mcore-bridge computes where a Llama 4 microbatch has none
_QWEN_NAMES = tuple((f"model.{part}", f"model.language_model.{part}") for part in ("layers.", "embed_tokens.", "norm."))


def _no_windows(config: Config) -> Iterator[str]:
    yield from allow_only(config, use_sliding_window=False)


def _qwen3_vl_moe_rules(config: Config) -> Iterator[str]:
    yield from no_attention_bias(config)
    yield from allow_only(config, norm_topk_prob=True)


def _delta_nets(config: Config) -> dict[str, Any]:
    # mcore-bridge goes by full_attention_interval, transformers by layer_types
    is_linear = (kind == "linear_attention" for kind in config["layer_types"])
    return {"linear_attention_freq": pattern(is_linear)}


def _intern_rules(config: Config) -> Iterator[str]:
    if config.get("model_type") not in _INTERN_MODELS:
        allowed = " or ".join(_INTERN_MODELS)
        yield refuse(config, "model_type", f"is not supported as InternVL's language model; must be {allowed}")
    yield from allow_only(config, use_sliding_window=False)
    if config.get("model_type") == "qwen3":
        yield from no_attention_bias(config)


def _glm4v_moe(config: Config) -> dict[str, Any]:
    return {**sigmoid_router(config), "qk_layernorm": False}


def _glm4v_moe_rules(config: Config) -> Iterator[str]:
    yield from allow_only(config, use_qk_norm=False)
    yield from normalized_router(config)
    yield from groups_of_experts(config)


def _llama4_rules(config: Config) -> Iterator[str]:
    yield from no_attention_bias(config)
    yield from allow_only(config, interleave_moe_layer_step=1)
    tower = config.get("vision_config") or {}
    if tower.get("image_size", _BLANK_IMAGE) != _BLANK_IMAGE:
        yield refuse(tower, "image_size", f"is not supported; mcore-bridge's blank image needs {_BLANK_IMAGE}")


VISION: tuple[Family, ...] = (
    Family(
        "qwen2_vl", ("Qwen2VLForConditionalGeneration",), refuses=_no_windows, has_images=True, takes_lora=True,
        decoder=_DECODER, renamed=(*_QWEN_NAMES, ("visual.", "model.visual.")),
    ),
    Family(
        "qwen2_5_vl", ("Qwen2_5_VLForConditionalGeneration",), refuses=_no_windows, has_images=True, takes_lora=True,
        decoder=_DECODER, renamed=(*_QWEN_NAMES, ("visual.", "model.visual.")),
    ),
    Family(
        "qwen3_vl", ("Qwen3VLForConditionalGeneration",), refuses=no_attention_bias, has_images=True, takes_lora=True,
        decoder=_DECODER,
    ),
    Family(
        "qwen3_vl_moe", ("Qwen3VLMoeForConditionalGeneration",), overrides=mixed_layers, refuses=_qwen3_vl_moe_rules,
        has_images=True, takes_lora=True, decoder=_DECODER,
    ),
    Family(
        "qwen3_5", ("Qwen3_5ForConditionalGeneration",), overrides=_delta_nets, refuses=no_attention_bias,
        unread=(r"mtp\.",), has_images=True, has_partial_rope=True, decoder=_DECODER,
        layer_types=("full_attention", "linear_attention"), needs="on a GPU flash-linear-attention (fla)",
    ),
    Family(
        "qwen3_5_moe", ("Qwen3_5MoeForConditionalGeneration",), overrides=_delta_nets, refuses=no_attention_bias,
        unread=(r"mtp\.",), has_images=True, has_partial_rope=True, decoder=_DECODER,
        layer_types=("full_attention", "linear_attention"), needs="on a GPU flash-linear-attention (fla)",
    ),
    Family(
        "internvl", ("InternVLForConditionalGeneration",), refuses=_intern_rules, is_tied=True, has_images=True,
        takes_lora=True, has_dynamic_rope=True, decoder=_DECODER,
        renamed=(
            ("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."),
            ("vision_tower.", "model.vision_tower."), ("multi_modal_projector.", "model.multi_modal_projector."),
        ),
    ),
    Family(
        "glm4v", ("Glm4vForConditionalGeneration",), has_images=True, has_partial_rope=True, decoder=_DECODER,
    ),
    Family(
        "glm4v_moe", ("Glm4vMoeForConditionalGeneration",), overrides=_glm4v_moe, refuses=_glm4v_moe_rules,
        has_prediction_layers=True, has_images=True, has_partial_rope=True, decoder=_DECODER,
    ),
    Family(
        "llama4", ("Llama4ForConditionalGeneration",), refuses=_llama4_rules, has_images=True,
        needs="sequences within attention_chunk_size", layer_types=("full_attention", "chunked_attention"),
        decoder="language_model.model.layers",
    ),
)  # fmt: skip
"""The multimodal families."""

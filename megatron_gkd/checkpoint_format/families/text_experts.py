"""Families of language models with mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_gkd.checkpoint_format.config_values import Config, allow_only, refuse, rope
from megatron_gkd.checkpoint_format.families.family import Family, PlainLayers
from megatron_gkd.checkpoint_format.families.overrides import (
    mixed_layers,
    pattern,
    sigmoid_router,
    windows_by_layer_type,
    windows_everywhere,
)
from megatron_gkd.checkpoint_format.families.rules import (
    groups_of_experts,
    latent_attention,
    no_attention_bias,
    normalized_router,
    several_experts,
)

_WINDOWS = ("full_attention", "sliding_attention")


def _qwen2_moe(config: Config) -> dict[str, Any]:
    return {**mixed_layers(config), **windows_by_layer_type(config)}


def _qwen3_moe(config: Config) -> dict[str, Any]:
    return {**mixed_layers(config), **windows_everywhere(config)}


def _qwen3_next(config: Config) -> dict[str, Any]:
    # mcore-bridge goes by full_attention_interval, transformers by layer_types
    is_linear = (kind == "linear_attention" for kind in config["layer_types"])
    return {**mixed_layers(config), "linear_attention_freq": pattern(is_linear)}


def _deepseek_v2(config: Config) -> dict[str, Any]:
    # transformers never normalizes these scores, and has groups by one topk_method only
    groups = {} if config.get("topk_method") == "group_limited_greedy" else {"moe_router_num_groups": None}
    no_groups = {} if not groups else {**groups, "moe_router_group_topk": None}
    return {"moe_router_pre_softmax": True, **no_groups}


def _deepseek_v2_rules(config: Config) -> Iterator[str]:
    yield from latent_attention(config)
    if config.get("topk_method") not in (None, "greedy", "group_limited_greedy"):
        yield refuse(config, "topk_method", "is not supported; must be greedy or group_limited_greedy")
    chosen, groups = config.get("num_experts_per_tok"), config.get("topk_group")
    if config.get("topk_method") == "group_limited_greedy" and chosen and groups and chosen // groups != 1:
        yield refuse(
            config,
            "topk_method",
            f"Megatron-Core scores a group by num_experts_per_tok // topk_group = {chosen // groups} experts, "
            "transformers by the best one; must be greedy",
        )


def _deepseek_v3_rules(config: Config) -> Iterator[str]:
    yield from latent_attention(config)
    yield from allow_only(config, scoring_func="sigmoid", topk_method="noaux_tc")
    yield from normalized_router(config)
    yield from groups_of_experts(config)


def _dots1(config: Config) -> dict[str, Any]:
    return {**sigmoid_router(config), **windows_by_layer_type(config)}


def _dots1_rules(config: Config) -> Iterator[str]:
    yield from no_attention_bias(config)
    yield from normalized_router(config, is_normalized_by_default=False)
    yield from groups_of_experts(config)


def _glm4_moe(config: Config) -> dict[str, Any]:
    return {**sigmoid_router(config), "qk_layernorm": bool(config["use_qk_norm"])}


def _sigmoid_groups(config: Config) -> Iterator[str]:
    yield from normalized_router(config)
    yield from groups_of_experts(config)


def _glm4_moe_lite(config: Config) -> dict[str, Any]:
    return {**sigmoid_router(config), **mixed_layers(config)}


def _glm4_moe_lite_rules(config: Config) -> Iterator[str]:
    yield from latent_attention(config)
    yield from _sigmoid_groups(config)


def _minimax_m2(config: Config) -> dict[str, Any]:
    found = {**sigmoid_router(config), "qk_layernorm": True}
    if config.get("rotary_dim") and "partial_rotary_factor" not in rope(config):
        # MiniMax's own key, which transformers 5.12 does not read
        found["partial_rotary_factor"] = config["rotary_dim"] / config["head_dim"]
    return found


def _minimax_m2_rules(config: Config) -> Iterator[str]:
    yield from allow_only(
        config, scoring_func="sigmoid", use_qk_norm=True, qk_norm_type="per_layer", use_routing_bias=True
    )
    yield from allow_only(config, shared_intermediate_size=0, router_jitter_noise=0.0)
    yield from several_experts(config)


def _hy_v3(config: Config) -> dict[str, Any]:
    return {**sigmoid_router(config), **mixed_layers(config), "qk_layernorm": True}


def _hy_v3_rules(config: Config) -> Iterator[str]:
    yield from no_attention_bias(config)
    yield from allow_only(
        config, moe_router_use_sigmoid=True, qk_norm=True, moe_router_enable_expert_bias=True, route_norm=True
    )
    yield from several_experts(config)


EXPERTS = (
    Family(
        "qwen2_moe", ("Qwen2MoeForCausalLM",), overrides=_qwen2_moe,
        refuses=lambda config: allow_only(config, qkv_bias=True), layer_types=_WINDOWS,
    ),
    Family(
        "qwen3_moe", ("Qwen3MoeForCausalLM",), overrides=_qwen3_moe, refuses=no_attention_bias,
        layers=PlainLayers(has_qk_norm=True), head_dim=128, takes_lora=True,
    ),
    Family(
        "qwen3_next", ("Qwen3NextForCausalLM",), overrides=_qwen3_next, refuses=no_attention_bias, head_dim=256,
        unread=(r"mtp\.",), has_partial_rope=True, layer_types=("full_attention", "linear_attention"),
        needs="on a GPU flash-linear-attention (fla)",
    ),
    Family(
        "olmoe", ("OlmoeForCausalLM",),
        refuses=lambda config: allow_only(config, attention_bias=False, clip_qkv=None),
    ),
    Family(
        "dots1", ("Dots1ForCausalLM",), overrides=_dots1, refuses=_dots1_rules, layer_types=_WINDOWS,
    ),
    Family(
        "glm4_moe", ("Glm4MoeForCausalLM",), overrides=_glm4_moe, refuses=_sigmoid_groups, has_prediction_layers=True,
        has_partial_rope=True,
    ),
    Family(
        "glm4_moe_lite", ("Glm4MoeLiteForCausalLM",), overrides=_glm4_moe_lite, refuses=_glm4_moe_lite_rules,
        has_prediction_layers=True,
    ),
    Family(
        "deepseek_v2", ("DeepseekV2ForCausalLM",), overrides=_deepseek_v2, refuses=_deepseek_v2_rules,
    ),
    Family(
        "deepseek_v3", ("DeepseekV3ForCausalLM",), overrides=sigmoid_router, refuses=_deepseek_v3_rules,
        has_prediction_layers=True,
    ),
    Family(
        "kimi_k2", ("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"), overrides=sigmoid_router,
        refuses=_deepseek_v3_rules, has_prediction_layers=True,
        needs="a configuration class, which is DeepSeek-V3's under this model_type",
    ),
    Family(
        "minimax_m2", ("MiniMaxM2ForCausalLM",), overrides=_minimax_m2, refuses=_minimax_m2_rules, head_dim=128,
        unread=(r"model\.mtp", r"mtp"), has_partial_rope=True,
    ),
    Family(
        "hy_v3", ("HYV3ForCausalLM",), overrides=_hy_v3, refuses=_hy_v3_rules, head_dim=128, has_prediction_layers=True,
    ),
    Family(
        "gpt_oss", ("GptOssForCausalLM",), refuses=lambda config: allow_only(config, attention_bias=True),
        head_dim=64, layer_types=_WINDOWS, quantization="mxfp4",
    ),
)  # fmt: skip
"""The families with mixtures of experts."""

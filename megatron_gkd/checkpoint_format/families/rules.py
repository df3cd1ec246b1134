"""Contents of config.json that Megatron-Core 0.16 does not compute, for several families.

Each function yields one line for each of them, from the language model's part of config.json.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_gkd.checkpoint_format.config_values import Config, allow_only, refuse, rope, rope_type

_GROUPS_SCORED_BY = 2


def no_attention_bias(config: Config) -> Iterator[str]:
    """Refuse biases in the attention's projections: transformers has one in the output projection too."""
    yield from allow_only(config, attention_bias=False, mlp_bias=False)


def normalized_router(config: Config, is_normalized_by_default: bool = True) -> Iterator[str]:
    """Refuse routers with sigmoid scores that are not normalized, as Megatron's always are for more than one expert."""
    if not config.get("norm_topk_prob", is_normalized_by_default):
        yield refuse(config, "norm_topk_prob", "is not supported with sigmoid scores; must be true")
    yield from several_experts(config)


def several_experts(config: Config) -> Iterator[str]:
    """Refuse sigmoid routers that choose one expert, whose score Megatron does not normalize."""
    if config.get("num_experts_per_tok") == 1:
        yield refuse(config, "num_experts_per_tok", "is not supported with sigmoid scores; must be at least 2")


def groups_of_experts(config: Config) -> Iterator[str]:
    """Refuse groups that Megatron scores by another number of experts than transformers, which adds up the best two."""
    chosen, groups = config.get("num_experts_per_tok"), config.get("topk_group")
    if (config.get("n_group") or 1) > 1 and chosen and groups and chosen // groups != _GROUPS_SCORED_BY:
        yield refuse(
            config,
            "topk_group",
            f"Megatron-Core scores a group by num_experts_per_tok // topk_group experts, which must be "
            f"{_GROUPS_SCORED_BY} (num_experts_per_tok = {chosen})",
        )


def latent_attention(config: Config) -> Iterator[str]:
    """Refuse what mcore-bridge's multi-latent attention does not read."""
    yield from allow_only(config, attention_bias=False, mlp_bias=False, rope_interleave=True)
    if rope_type(config) == "yarn":
        for key in ("mscale", "mscale_all_dim"):
            if key not in rope(config):
                yield f"its config.json has rotary parameters of type yarn without {key}; give it (0 for none)"

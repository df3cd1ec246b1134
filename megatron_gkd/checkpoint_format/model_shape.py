"""The shape of a model, as far as a layout and a recipe have to fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.checkpoint_format.config_file import read_config
from megatron_gkd.checkpoint_format.config_values import (
    expert_size,
    has_experts_in,
    has_latent_attention,
    num_experts,
    num_key_value_heads,
    rope,
    rope_type,
    shared_expert_size,
    text_config,
)
from megatron_gkd.checkpoint_format.families import family_of
from megatron_gkd.checkpoint_format.quantization import quantization_method

_EXPERTS_WITH_BIASES = ("gpt_oss",)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Hugging Face checkpoint's language model.

    Attributes:
        num_layers: its decoder layers.
        num_attention_heads: heads of queries.
        num_key_value_heads: heads of keys and values; all heads have their own with multi-latent attention.
        feed_forward_sizes: rows of the feed-forward layers that tensor parallelism shards: those of dense layers and of
            experts that see every token; empty if there are none.
        expert_size: rows of one expert's layer, 0 for a dense model.
        num_experts: 0 for a dense model.
        max_positions: the longest sequence.
        vocab_size: rows of the embedding.
        delta_heads: key heads of its gated delta nets, 0 if it has none.
        has_experts_in: for each layer, whether it is a mixture of experts.
        takes_lora: whether all of its linear layers are known to `lora_layers`, and its layers are alike.
        has_latent_attention: whether it has multi-latent attention.
        model_type: its family.
        has_images: whether it reads images.
        decoder: the module of its layers in transformers.
        num_deepstack: the first layers that get features of images of their own.
        is_quantized: whether its files are quantized.
    """

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    feed_forward_sizes: tuple[int, ...]
    expert_size: int
    num_experts: int
    max_positions: int
    vocab_size: int
    delta_heads: int
    has_experts_in: tuple[bool, ...]
    takes_lora: bool
    has_latent_attention: bool
    model_type: str
    has_images: bool
    decoder: str
    num_deepstack: int
    is_quantized: bool

    @property
    def has_expert_biases(self) -> bool:
        """Whether the experts' linear layers have biases."""
        return self.model_type in _EXPERTS_WITH_BIASES


def read_shape(model: str) -> ModelShape | None:
    """Return the shape of a local model, None for a hub id (`org/name`).

    Raises:
        ValueError: it is neither, or not supported.
    """
    folder = Path(model)
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
            return None
        raise ValueError("must be a Hugging Face folder that exists, or a hub id (org/name)")
    if not (folder / "config.json").is_file():
        raise ValueError("must be a Hugging Face folder; there is no config.json in it")
    return shape_of(read_config(folder))


def shape_of(whole: Mapping[str, Any]) -> ModelShape:
    """Return the shape that the content of a supported config.json describes."""
    config, family = text_config(whole), family_of(whole)
    experts, flags = num_experts(config), has_experts_in(config)
    dense = [] if all(flags) else [config["intermediate_size"]]
    shared = [shared_expert_size(config)] if experts else []
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=num_key_value_heads(config),
        feed_forward_sizes=tuple(size for size in (*dense, *shared) if size),
        expert_size=expert_size(config) if experts else 0,
        num_experts=experts,
        max_positions=_max_positions(config),
        vocab_size=config["vocab_size"],
        delta_heads=config.get("linear_num_key_heads", 0) if "linear_attention" in family.layer_types else 0,
        has_experts_in=tuple(flags),
        takes_lora=family.takes_lora and len(set(flags)) == 1,
        has_latent_attention=has_latent_attention(config),
        model_type=family.model_type,
        has_images=family.has_images,
        decoder=family.decoder,
        num_deepstack=len((whole.get("vision_config") or {}).get("deepstack_visual_indexes") or ()),
        is_quantized=quantization_method(whole) is not None,
    )


def _max_positions(config: Mapping[str, Any]) -> int:
    """Return the longest sequence that Megatron's model computes as transformers does."""
    longest: int = config["max_position_embeddings"]
    if rope_type(config) == "yarn":  # max_position_embeddings may be the length before scaling
        original = rope(config).get("original_max_position_embeddings") or longest
        longest = max(longest, int(rope(config).get("factor", 1) * original))
    if config.get("attention_chunk_size"):  # beyond it a token sees a part of those before it
        longest = min(longest, config["attention_chunk_size"])
    if config.get("attn_temperature_tuning"):  # beyond it scores are scaled by the position
        longest = min(longest, config.get("floor_scale", 8192) - 1)
    return longest

"""The shape of a model, as far as a layout and a recipe have to fit it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.checkpoint_format.config_file import num_experts, num_key_value_heads, read_config, rope, rope_type


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Hugging Face checkpoint. `num_experts` is 0 for a dense model."""

    num_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    feed_forward_size: int
    num_experts: int
    max_positions: int
    vocab_size: int


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
    return _shape(read_config(folder))


def _shape(config: Mapping[str, Any]) -> ModelShape:
    experts = num_experts(config)
    extended = 0
    if rope_type(config) == "yarn":  # max_position_embeddings may be the length before scaling
        original = rope(config).get("original_max_position_embeddings") or config["max_position_embeddings"]
        extended = int(rope(config).get("factor", 1) * original)
    return ModelShape(
        num_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=num_key_value_heads(config),
        feed_forward_size=config["moe_intermediate_size" if experts else "intermediate_size"],
        num_experts=experts,
        max_positions=max(config["max_position_embeddings"], extended),
        vocab_size=config["vocab_size"],
    )

"""Read a checkpoint's config.json, and refuse what the Megatron model would not compute."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A supported architecture.

    Attributes:
        model_type: its name in config.json.
        has_experts: whether it is a mixture of experts.
        has_qkv_bias: whether the projections to queries, keys and values have a bias.
        has_qk_norm: whether queries and keys are normalized.
        head_dim: transformers' default where config.json has no head_dim; None: hidden_size / num_attention_heads.
    """

    model_type: str
    has_experts: bool = False
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    head_dim: int | None = None


ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama"),
    "Qwen2ForCausalLM": Architecture("qwen2", has_qkv_bias=True),
    "Qwen3ForCausalLM": Architecture("qwen3", has_qk_norm=True, head_dim=128),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", has_experts=True, has_qk_norm=True, head_dim=128),
}
"""The supported architectures by their names in config.json."""
_OF_MODEL_TYPE = {one.model_type: one for one in ARCHITECTURES.values()}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the sequence length, which differs between packed rows."""


class CheckpointProblem(ValueError):
    """A checkpoint can't be used. The message is one line that names the file and the key or tensor."""


@dataclass(frozen=True)
class _OnlyValue:
    """A key of config.json that changes what the model computes, and the one value that is supported.

    Attributes:
        model_types: models whose transformers implementation reads the key; empty: all.
    """

    key: str
    value: Any
    model_types: tuple[str, ...] = ()


_ONLY_VALUES = (
    _OnlyValue("hidden_act", "silu"),
    _OnlyValue("attention_bias", False, ("llama", "qwen3", "qwen3_moe")),
    _OnlyValue("mlp_bias", False, ("llama",)),
    _OnlyValue("use_sliding_window", False, ("qwen2", "qwen3", "qwen3_moe")),
    _OnlyValue("decoder_sparse_step", 1, ("qwen3_moe",)),
    _OnlyValue("mlp_only_layers", [], ("qwen3_moe",)),
    _OnlyValue("partial_rotary_factor", 1.0),
    _OnlyValue("quantization_config", None),
)


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of config.json.

    Raises:
        CheckpointProblem: it does not describe a supported model.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointProblem(f"its config.json is not a model's configuration ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointProblem("its config.json is not a model's configuration (not a JSON object)")
    for problem in _problems(config):
        raise CheckpointProblem(problem)
    return config


def architecture(model_type: str) -> Architecture:
    """Return the architecture of a supported model by its `model_type` in config.json."""
    return _OF_MODEL_TYPE[model_type]


def num_experts(config: Mapping[str, Any]) -> int:
    """Return the number of experts, 0 for a dense model."""
    if not architecture(config["model_type"]).has_experts:
        return 0
    # transformers 5 writes num_local_experts where earlier releases wrote num_experts
    found: int = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
    return found


def num_key_value_heads(config: Mapping[str, Any]) -> int:
    """Return the number of groups of attention heads that share keys and values."""
    found: int = config.get("num_key_value_heads") or config["num_attention_heads"]
    return found


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the size of one attention head."""
    known: int | None = config.get("head_dim") or architecture(config["model_type"]).head_dim
    return known or config["hidden_size"] // config["num_attention_heads"]


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the LM head is the embedding; transformers' default for all supported models is that it is not."""
    return bool(config.get("tie_word_embeddings", False))


def rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the parameters of the rotary embedding, under whichever key this release of transformers wrote them."""
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def rope_type(config: Mapping[str, Any]) -> str:
    """Return how the rotary embedding is scaled to longer sequences, one of ROPE_TYPES in a supported model."""
    found: str = rope(config).get("rope_type", rope(config).get("type", "default"))
    return found


def _problems(config: dict[str, Any]) -> Iterator[str]:
    named = config.get("architectures") or ["none named"]
    if named[0] not in ARCHITECTURES:
        yield f"its architecture ({named[0]}) must be one of {', '.join(ARCHITECTURES)}"
        return
    model_type = ARCHITECTURES[named[0]].model_type
    if config.get("model_type") != model_type:
        yield _refuse(config, "model_type", f"contradicts architectures = {named[0]}; must be {model_type}")
        return
    for only in _ONLY_VALUES:
        value = config.get(only.key)
        if value not in (None, only.value) and (not only.model_types or model_type in only.model_types):
            yield _refuse(config, only.key, f"is not supported; must be {json.dumps(only.value)}")
    yield from _wrong_sizes(config)
    yield from _unsupported_rope(config)
    unsupported_layers = set(config.get("layer_types") or ()) - {"full_attention"}
    if unsupported_layers:
        yield f"its config.json has layer_types with {min(unsupported_layers)}; all must be full_attention"


def _wrong_sizes(config: dict[str, Any]) -> Iterator[str]:
    is_mixture = architecture(config["model_type"]).has_experts
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]
    required.append("moe_intermediate_size" if is_mixture else "intermediate_size")
    if is_mixture:
        required.append("num_experts" if "num_experts" in config else "num_local_experts")
    for key in required:
        if key not in config:
            yield f"its config.json has no {key}"
            return
    optional = [key for key in ("num_key_value_heads", "head_dim") if config.get(key) is not None]
    for key in (*required, *optional):
        if type(config[key]) is not int or config[key] < 1:
            yield _refuse(config, key, "must be an integer of at least 1")
            return
    if config["num_attention_heads"] % num_key_value_heads(config):
        allowed = f"must divide num_attention_heads ({config['num_attention_heads']})"
        yield _refuse(config, "num_key_value_heads", allowed)


def _unsupported_rope(config: dict[str, Any]) -> Iterator[str]:
    parameters = rope(config)
    if not isinstance(parameters, dict):
        yield f"its config.json has rotary parameters = {json.dumps(parameters)}; must be a JSON object"
    elif rope_type(config) not in ROPE_TYPES:
        found = json.dumps(rope_type(config))
        yield f"its config.json has rope_type = {found}, which is not supported; must be one of {', '.join(ROPE_TYPES)}"
    elif parameters.get("partial_rotary_factor") not in (None, 1.0):
        yield _refuse(parameters, "partial_rotary_factor", "is not supported; must be 1.0")


def _refuse(config: Mapping[str, Any], key: str, why: str) -> str:
    value = json.dumps(config.get(key))
    return f"its config.json has {key} = {value if len(value) <= 80 else value[:77] + '...'}: {why}"

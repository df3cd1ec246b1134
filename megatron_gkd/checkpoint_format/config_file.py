"""Read a checkpoint's config.json, and refuse what the Megatron model would not compute."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gkd.checkpoint_format.config_values import (
    ROPE_TYPES,
    Config,
    allow_only,
    expert_key,
    has_experts_in,
    num_key_value_heads,
    refuse,
    rope,
    rope_type,
    text_config,
)
from megatron_gkd.checkpoint_format.families import FAMILIES, Family, families_of_architecture, family_of
from megatron_gkd.checkpoint_format.families.refused import REFUSED
from megatron_gkd.checkpoint_format.output_head import wrong_head_scaling
from megatron_gkd.checkpoint_format.quantization import unsupported_quantization

_CODE = "auto_map"  # names the classes of a model whose code is in its folder


class CheckpointProblem(ValueError):
    """A checkpoint can't be used. The message is one line that names the file and the key or tensor."""


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


def head_dim(config: Config) -> int:
    """Return the size of one attention head of a supported language model."""
    known: int | None = config.get("head_dim") or family_of(config).head_dim
    return known or config["hidden_size"] // config["num_attention_heads"]


def is_tied(config: Config) -> bool:
    """Return whether the LM head of a supported model is its embedding, as transformers reads config.json."""
    return bool(config.get("tie_word_embeddings", family_of(config).is_tied))


def require_trust(folder: Path, *, trust_remote_code: bool) -> None:
    """Check that a tokenizer that is code in a checkpoint's folder may be run.

    Code for the configuration and the model is not run: these are transformers' own classes, or ours, for all families.

    Args:
        folder: the checkpoint.
        trust_remote_code: the recipe's key beside the model.

    Raises:
        CheckpointProblem: there is such a tokenizer, and it may not be run.
    """
    path = folder / "tokenizer_config.json"
    if trust_remote_code or (folder / "tokenizer.json").exists() or not path.exists():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointProblem(f"its tokenizer_config.json is not a JSON file ({error})") from error
    if isinstance(config, dict) and "AutoTokenizer" in (config.get(_CODE) or {}):
        allow = "allow it with trust_remote_code (of a teacher: teacher_trust_remote_code)"
        problem = refuse(config, _CODE, f"names code in its folder; {allow}")
        raise CheckpointProblem(problem.replace("config.json", "tokenizer_config.json", 1))


def _problems(config: dict[str, Any]) -> Iterator[str]:
    named = config.get("architectures") or ["none named"]
    families = families_of_architecture(named[0])
    if not families:
        yield _unknown_architecture(named[0])
        return
    allowed = [family.model_type for family in families]
    if config.get("model_type") not in allowed:
        contradiction = f"contradicts architectures = {named[0]}; must be {' or '.join(allowed)}"
        yield refuse(config, "model_type", contradiction)
        return
    family, text = family_of(config), text_config(config)
    yield from allow_only(text, hidden_act="silu")
    yield from unsupported_quantization(config, family)
    yield from family.refuses(text)
    yield from wrong_head_scaling(text, family.head_keys)
    yield from _wrong_sizes(text)
    yield from _unsupported_rope(text, family)
    unsupported_layers = set(text.get("layer_types") or ()) - set(family.layer_types)
    if unsupported_layers:
        allowed_types = " or ".join(family.layer_types)
        yield f"its config.json has layer_types with {min(unsupported_layers)}; all must be {allowed_types}"


def _unknown_architecture(name: str) -> str:
    if name in REFUSED:
        return f"its architecture ({name}) is not supported: {REFUSED[name]}"
    return f"its architecture ({name}) must be of one of the families {', '.join(FAMILIES)}"


def _wrong_sizes(text: Config) -> Iterator[str]:
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"]
    experts = expert_key(text)
    required.append("moe_intermediate_size" if experts and "moe_intermediate_size" in text else "intermediate_size")
    if experts is not None:
        required.append(experts)
    for key in required:
        if key not in text:
            yield f"its config.json has no {key}"
            return
    optional = [key for key in ("num_key_value_heads", "head_dim") if text.get(key) is not None]
    for key in (*required, *optional):
        if type(text[key]) is not int or text[key] < 1:
            yield refuse(text, key, "must be an integer of at least 1")
            return
    if text["num_attention_heads"] % num_key_value_heads(text):
        allowed = f"must divide num_attention_heads ({text['num_attention_heads']})"
        yield refuse(text, "num_key_value_heads", allowed)
    yield from _wrong_layers(text)


def _wrong_layers(text: Config) -> Iterator[str]:
    layers = text["num_hidden_layers"]
    for key in ("layer_types", "mlp_layer_types"):
        kinds = text.get(key)
        if kinds is not None and (not isinstance(kinds, list) or len(kinds) != layers):
            yield refuse(text, key, f"must be a list with one entry for each of the {layers} layers")
            return
    if not all(has_experts_in(text)) and "intermediate_size" not in text:
        yield "its config.json has no intermediate_size, which its dense layers need"


def _unsupported_rope(text: Config, family: Family) -> Iterator[str]:
    parameters = rope(text)
    if not isinstance(parameters, dict):
        yield f"its config.json has rotary parameters = {json.dumps(parameters)}; must be a JSON object"
    elif rope_type(text) not in ROPE_TYPES and not (family.has_dynamic_rope and rope_type(text) == "dynamic"):
        found = json.dumps(rope_type(text))
        yield f"its config.json has rope_type = {found}, which is not supported; must be one of {', '.join(ROPE_TYPES)}"
    elif not family.has_partial_rope:
        yield from allow_only(text, partial_rotary_factor=1.0)
        yield from allow_only(parameters, partial_rotary_factor=1.0)

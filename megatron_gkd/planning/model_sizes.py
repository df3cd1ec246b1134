"""Sizes of a whole model for decoding, transfers and layouts, from transformers' modules without memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from megatron_gkd.checkpoint_format.config_file import CheckpointProblem, head_dim, read_config
from megatron_gkd.checkpoint_format.config_values import (
    has_latent_attention,
    num_experts,
    num_key_value_heads,
    text_config,
)
from megatron_gkd.errors import UserError

_LINEAR = "linear_attention"


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a whole model. Numbers of parameters, not bytes.

    Attributes:
        parameters: all of them.
        experts: those of routed experts.
        embedding: those of a token embedding that is not the head as well.
        largest_tensor: those of the largest tensor, experts aside.
        largest_experts: those of the largest matrices of all experts of a layer together.
        layers: number of decoder layers.
        hidden_size: width of the hidden states.
        vocab_size: rows of the embedding.
        num_experts: of a layer; 0 for a dense model.
        experts_per_token: of a layer.
        kv_values: values that the cache of keys and values holds for a token, over all layers.
        kv_heads: groups of heads that tensor-parallel ranks can share the cache by; 1 with a latent cache.
    """

    parameters: int
    experts: int
    embedding: int
    largest_tensor: int
    largest_experts: int
    layers: int
    hidden_size: int
    vocab_size: int
    num_experts: int
    experts_per_token: int
    kv_values: int
    kv_heads: int

    @property
    def active(self) -> int:
        """Number of parameters that a token is multiplied with, without the embedding."""
        routed = self.experts * self.experts_per_token // self.num_experts if self.num_experts else 0
        return self.parameters - self.embedding - self.experts + routed

    def parameters_read(self, tokens: int) -> float:
        """Return how many parameters a forward pass of so many tokens reads, if routers choose experts at random."""
        dense = self.parameters - self.embedding - self.experts
        if not self.num_experts:
            return dense
        return dense + self.experts * (1 - (1 - self.experts_per_token / self.num_experts) ** tokens)


def read_sizes(model: str) -> ModelSizes:
    """Return the sizes of the model in a folder with a config.json.

    Raises:
        UserError: transformers can't build the model from it.
    """
    # Megatron-Core, which it imports, is imported only after the measurement has prepared this process.
    from megatron_gkd.models.own_configurations import register_own_configurations

    register_own_configurations()
    try:
        raw = text_config(read_config(Path(model)))
        config = AutoConfig.from_pretrained(model)
        built = _build(config)
    except CheckpointProblem as problem:
        raise UserError(f"{model}: {problem}") from problem
    except Exception as error:  # transformers raises many kinds for a wrong value
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{model}: transformers can't build the model of its config.json ({reason})") from error
    experts = num_experts(raw)
    named = dict(built.named_parameters())
    routed = {name: one for name, one in named.items() if experts and ".experts." in name}
    others = [one.numel() for name, one in named.items() if name not in routed]
    return ModelSizes(
        parameters=sum(one.numel() for one in named.values()),
        experts=sum(one.numel() for one in routed.values()),
        embedding=0 if _is_tied(built) else built.get_input_embeddings().weight.numel(),
        largest_tensor=max(others),
        largest_experts=max((one.numel() * (experts if one.dim() == 2 else 1) for one in routed.values()), default=0),
        layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        vocab_size=raw["vocab_size"],
        num_experts=experts,
        experts_per_token=_experts_per_token(raw) if experts else 0,
        kv_values=_kv_values(raw),
        kv_heads=1 if has_latent_attention(raw) else num_key_value_heads(raw),
    )


def _build(config: PretrainedConfig) -> Any:
    """Return transformers' model on the meta device: that of its architecture, or the language model alone."""
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            return kind(config)
        return AutoModelForCausalLM.from_config(config.get_text_config())


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _experts_per_token(config: Mapping[str, Any]) -> int:
    for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k"):
        if config.get(key):
            return int(config[key])
    return 1


def _kv_values(config: Mapping[str, Any]) -> int:
    kinds = config.get("layer_types") or [""] * config["num_hidden_layers"]
    layers = sum(kind != _LINEAR for kind in kinds)  # those of linear attention have a state of fixed size
    if has_latent_attention(config):
        return layers * (config["kv_lora_rank"] + config.get("qk_rope_head_dim", 0))
    return layers * 2 * num_key_value_heads(config) * head_dim(config)

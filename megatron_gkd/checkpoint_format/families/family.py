"""What is known of one family of models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_gkd.checkpoint_format.config_values import Config, text_config


def _no_overrides(_: Config) -> dict[str, Any]:
    return {}


def _no_problems(_: Config) -> Iterator[str]:
    return iter(())


@dataclass(frozen=True)
class PlainLayers:
    """The tensors of decoder layers that are all Llama's, up to a few; the exact list is known without torch.

    Attributes:
        has_qkv_bias: whether the projections to queries, keys and values have a bias.
        has_qk_norm: whether queries and keys are normalized, head by head.
    """

    has_qkv_bias: bool = False
    has_qk_norm: bool = False


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type: its name in config.json.
        architectures: the names of its models in config.json.
        overrides: returns the settings of Megatron's model that mcore-bridge derives wrongly or not at all, from the
            configuration as transformers completes it (`to_dict`).
        refuses: yields, one line each, the contents of config.json that the Megatron model would not compute.
        needs: what must be there for it beside Megatron-Core, in words, for the documentation; empty for nothing.
        unread: regular expressions of the names of tensors that a checkpoint may have although no model reads them.
            They match from the name's beginning.
        has_prediction_layers: whether layers from num_hidden_layers on may be stored, for multi-token prediction;
            they are not read either.
        has_images: whether its models read images.
        layers: the tensors of its layers; None where only the load finds out whether all are there.
        head_dim: transformers' default where config.json has no head_dim; None: hidden_size / num_attention_heads.
        is_tied: transformers' default where config.json has no tie_word_embeddings.
        has_partial_rope: whether it may rotate a part of each head only.
        layer_types: the kinds of attention that its `layer_types` may name.
        quantization: the `quant_method` of quantized files that are dequantized when they are read.
        takes_lora: whether all linear layers of its language model are known to `lora_layers`.
        decoder: the module of the language model's layers in transformers.
        renamed: beginnings of tensors' names in files, and of the parameters in transformers that they are.
        head_keys: the keys of `output_head.HEAD_KEYS` by which transformers scales and bounds its logits.
        has_dynamic_rope: whether rotary embeddings may depend on the length beyond the positions, which no row reaches.
    """

    model_type: str
    architectures: tuple[str, ...]
    overrides: Callable[[Config], dict[str, Any]] = _no_overrides
    refuses: Callable[[Config], Iterator[str]] = _no_problems
    needs: str = ""
    unread: tuple[str, ...] = ()
    has_prediction_layers: bool = False
    has_images: bool = False
    layers: PlainLayers | None = None
    head_dim: int | None = None
    is_tied: bool = False
    has_partial_rope: bool = False
    layer_types: tuple[str, ...] = ("full_attention",)
    quantization: str = "fp8"
    takes_lora: bool = False
    decoder: str = "model.layers"
    renamed: tuple[tuple[str, str], ...] = ()
    head_keys: tuple[str, ...] = ()
    has_dynamic_rope: bool = False

    def parameter_name(self, name: str) -> str:
        """Return the name in transformers of the parameter that a tensor in the files is."""
        for stored, own in self.renamed:
            if name.startswith(stored):
                return own + name.removeprefix(stored)
        return name

    def is_unread(self, name: str, config: Config) -> bool:
        """Return whether a checkpoint with this config.json may have a tensor of this name that nobody reads."""
        if any(re.match(expression, name) for expression in self.unread):
            return True
        layer = re.match(rf"{re.escape(self.decoder)}\.(\d+)\.", self.parameter_name(name))
        return bool(self.has_prediction_layers and layer and int(layer[1]) >= text_config(config)["num_hidden_layers"])

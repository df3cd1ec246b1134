"""Which layers of a model get LoRA factors, and with which rank and scale, from names alone.

Megatron-Core joins q, k and v into one matrix, and gate and up into another. The modules that are joined share the
factor A, so they are adapted together or not at all, with one rank and one alpha.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ALL_LINEAR = "all-linear"
DECODER = "model.layers"  # the module of a text model's layers in transformers
LANGUAGE = "llm"  # the part of a multimodal model that a text model consists of
_PARTS = {
    "self_attention.linear_qkv": ("self_attn", ("q_proj", "k_proj", "v_proj")),
    "self_attention.linear_proj": ("self_attn", ("o_proj",)),
    "mlp.linear_fc1": ("mlp", ("gate_proj", "up_proj")),
    "mlp.linear_fc2": ("mlp", ("down_proj",)),
    "mlp.experts.linear_fc1": ("mlp.experts", ("gate_proj", "up_proj")),
    "mlp.experts.linear_fc2": ("mlp.experts", ("down_proj",)),
}
_REFUSED = {
    **dict.fromkeys(
        ("router", "gate", "mlp.router", "mlp.gate"), "adapters of a router could not be switched off or merged"
    ),
    **dict.fromkeys(
        ("lm_head", "output_layer", "embed_tokens", "word_embeddings", "embedding"),
        "embeddings and the LM head take no adapters",
    ),
}


class LoraProblem(ValueError):
    """A LoRA setting does not suit the model. The text begins with the leaf of the recipe's section `lora`."""


@dataclass(frozen=True)
class BaseLayer:
    """A linear layer of Megatron-Core that can be adapted.

    Attributes:
        name: its name in the whole model, with the layer's number there: `decoder.layers.3.mlp.linear_fc1`.
        hf_names: the Hugging Face modules that it joins: `model.layers.3.mlp.gate_proj`, `model.layers.3.mlp.up_proj`.
        container: the Hugging Face name of all experts of the layer; None for a dense layer.
        part: the part of a multimodal model that it belongs to: llm, vit or aligner. Layers of the last two are
            transformers' own, and have one name.
    """

    name: str
    hf_names: tuple[str, ...]
    container: str | None = None
    part: str = LANGUAGE

    @classmethod
    def from_name(cls, name: str, num_experts: int, decoder: str = DECODER) -> BaseLayer:
        """Return the layer with a name of Megatron-Core in a model of so many experts; `decoder`: see `DECODER`."""
        number, part = name.removeprefix("decoder.layers.").split(".", 1)
        parent, leaves = _PARTS[part]
        parent = f"{decoder}.{number}.{parent}"
        if not parent.endswith(".experts"):
            return cls(name, tuple(f"{parent}.{leaf}" for leaf in leaves))
        names = tuple(f"{parent}.{expert}.{leaf}" for expert in range(num_experts) for leaf in leaves)
        return cls(name, names, container=parent)

    @property
    def leaves(self) -> tuple[str, ...]:
        """The last parts of `hf_names`."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.hf_names))


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that gets factors A [rank, in] and B [out, rank]; its output grows by `scaling` times B A x."""

    base: BaseLayer
    rank: int
    scaling: float

    @property
    def alpha(self) -> float:
        """The alpha that makes `scaling` without rsLoRA."""
        return self.scaling * self.rank


@dataclass(frozen=True)
class LayerRules:
    """The recipe's choice of layers, ranks and scales.

    Attributes:
        target_modules: `all-linear`, or names of Hugging Face or Megatron-Core, whole or their last parts.
        target_regex: instead of them, an expression that whole names must match.
        rank_pattern: ranks by Hugging Face names, whole, their last parts, or expressions for these.
        alpha_pattern: alphas by the same names.
        parts: the parts of a multimodal model that `all-linear` covers. A name in `target_modules` means layers of
            vision tower and aligner only if the language model has none of that name.
    """

    rank: int = 8
    alpha: float = 32.0
    target_modules: tuple[str, ...] = (ALL_LINEAR,)
    target_regex: str | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    parts: frozenset[str] = frozenset({LANGUAGE})

    def choose(self, layers: Sequence[BaseLayer]) -> tuple[AdaptedLayer, ...]:
        """Return those of `layers`, all of a model, that are adapted.

        Raises:
            LoraProblem: the rules do not suit the model.
        """
        self._require_known_names(layers)
        language = [layer for layer in layers if layer.part == LANGUAGE]
        elsewhere = {entry for entry in self.target_modules if not any(_names_layer(entry, one) for one in language)}
        chosen = [layer for layer in layers if self._is_target(layer, elsewhere)]
        if not chosen:
            raise LoraProblem(f"{self._shown_targets}: no layer of the model has such a name")
        _require_all_or_no_experts(layers, chosen, self._shown_targets)
        for leaf, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            _require_used_keys(leaf, pattern, chosen)
        return tuple(self._adapt(layer) for layer in chosen)

    @property
    def _shown_targets(self) -> str:
        if self.target_regex is not None:
            return f"target_regex = {self.target_regex}"
        return f"target_modules = [{', '.join(self.target_modules)}]"

    def _require_known_names(self, layers: Sequence[BaseLayer]) -> None:
        if self.target_regex is not None:
            return
        for entry in self.target_modules:
            reason = _REFUSED.get(entry)
            if reason is not None:
                raise LoraProblem(f"target_modules = {entry}: can't be a target, as {reason}; remove it")
            if entry != ALL_LINEAR and not any(_names_layer(entry, layer) for layer in layers):
                raise LoraProblem(
                    f"target_modules = {entry}: no layer of the model has this name; use all-linear, {_known(layers)}"
                )

    def _is_target(self, layer: BaseLayer, elsewhere: set[str]) -> bool:
        """Return whether a layer is adapted; `elsewhere`: the entries that name no layer of the language model."""
        if self.target_regex is not None:
            expression = _compiled("target_regex", self.target_regex)
            if expression.fullmatch(layer.name):
                return True
            matched = [name for name in layer.hf_names if expression.fullmatch(name)]
        else:
            if ALL_LINEAR in self.target_modules and layer.part in self.parts:
                return True
            if layer.part != LANGUAGE:
                return any(_is_part(entry, layer.name) for entry in elsewhere)
            if any(_is_part(entry, layer.name) for entry in self.target_modules):
                return True
            if layer.container and any(_is_part(entry, layer.container) for entry in self.target_modules):
                return True
            matched = [name for name in layer.hf_names if any(_is_part(e, name) for e in self.target_modules)]
        if matched and len(matched) < len(layer.hf_names):
            raise LoraProblem(f"{self._shown_targets}: {describe_joined(layer)}; name all of them or none")
        return bool(matched)

    def _adapt(self, layer: BaseLayer) -> AdaptedLayer:
        rank = int(_value_of(layer, "rank_pattern", self.rank_pattern, self.rank))
        alpha = float(_value_of(layer, "alpha_pattern", self.alpha_pattern, self.alpha))
        return AdaptedLayer(layer, rank, alpha / rank**0.5 if self.use_rslora else alpha / rank)


def layers_of_shape(num_layers: int, num_experts: int, decoder: str = DECODER) -> list[BaseLayer]:
    """Return the layers of a model whose decoder layers are all alike; `decoder`: see `DECODER`."""
    mlp = "mlp.experts" if num_experts else "mlp"
    parts = ("self_attention.linear_qkv", "self_attention.linear_proj", f"{mlp}.linear_fc1", f"{mlp}.linear_fc2")
    return [
        BaseLayer.from_name(f"decoder.layers.{number}.{part}", num_experts, decoder)
        for number in range(num_layers)
        for part in parts
    ]


def why_no_adapters(model_type: str) -> str:
    """Return why a model of a family without `takes_lora`, or with experts in some layers, gets no adapters."""
    return f"adapters on all linear layers of this {model_type} model are not supported"


def can_be_adapted(name: str) -> bool:
    """Return whether a module of a Megatron-Core model, by its name in a chunk, can have LoRA factors here."""
    parts = name.removeprefix("decoder.layers.").split(".", 1)
    return name.startswith("decoder.layers.") and len(parts) == 2 and parts[1] in _PARTS


def _is_part(entry: str, name: str) -> bool:
    return name == entry or name.endswith(f".{entry}")


def _names_layer(entry: str, layer: BaseLayer) -> bool:
    names = (layer.name, *layer.hf_names, *([layer.container] if layer.container else []))
    return any(_is_part(entry, name) for name in names)


def _known(layers: Iterable[BaseLayer]) -> str:
    layers = [layer for layer in layers if layer.part == LANGUAGE]
    hf_leaves = dict.fromkeys(leaf for layer in layers for leaf in layer.leaves)
    own = dict.fromkeys(layer.name.rpartition(".")[2] for layer in layers)
    experts = ["experts"] if any(layer.container for layer in layers) else []
    return ", ".join([*hf_leaves, *experts, *own])


def describe_joined(layer: BaseLayer) -> str:
    """Return in words which modules of Hugging Face are one layer here."""
    *first, last = layer.leaves
    joined = f"{', '.join(first)} and {last}" if first else last
    if layer.container:
        return f"{joined} of all experts in {layer.container} are one layer here"
    return f"{joined} are one matrix in Megatron-Core ({layer.name.rpartition('.')[2]}) and share one A"


def _require_all_or_no_experts(layers: Sequence[BaseLayer], chosen: Sequence[BaseLayer], shown: str) -> None:
    """PEFT reads the factors of experts for all layers of a model, or for none."""
    for part in {layer.name.rpartition(".")[2] for layer in layers if layer.container}:
        count = [sum(1 for layer in some if layer.container and layer.name.endswith(part)) for some in (layers, chosen)]
        if 0 < count[1] < count[0]:
            raise LoraProblem(
                f"{shown}: experts are adapted in {count[1]} of {count[0]} layers; PEFT reads those of all layers or "
                "of none"
            )


def _require_used_keys(leaf: str, pattern: Mapping[str, float], chosen: Sequence[BaseLayer]) -> None:
    for key in pattern:
        found = [layer for layer in chosen if any(_matches_pattern(leaf, key, name) for name in layer.hf_names)]
        if not found:
            raise LoraProblem(f"{leaf} = {key}: no adapted module has this name; use Hugging Face names (q_proj)")
        if any(layer.container for layer in found):
            raise LoraProblem(f"{leaf} = {key}: matches experts, whose factors PEFT reads with the same rank and alpha")


def _value_of(layer: BaseLayer, leaf: str, pattern: Mapping[str, float], default: float) -> float:
    values = {value_of_name(name, leaf, pattern, default) for name in layer.hf_names}
    if len(values) > 1:
        raise LoraProblem(f"{leaf} = {', '.join(pattern)}: {describe_joined(layer)}; give all of them the same value")
    return values.pop()


def value_of_name(name: str, leaf: str, pattern: Mapping[str, float], default: float) -> float:
    """Return the value of the first key of `pattern` that matches a name as PEFT matches it, else `default`.

    Args:
        name: the Hugging Face name of a module.
        leaf: the recipe's key of `pattern`.
        pattern: values by names, their last parts, or expressions for these.
        default: the value of names without a match.
    """
    return next((value for key, value in pattern.items() if _matches_pattern(leaf, key, name)), default)


def _matches_pattern(leaf: str, key: str, name: str) -> bool:
    """Match as PEFT does."""
    return _compiled(leaf, rf"(.*\.)?({key})$", shown=key).match(name) is not None


def _compiled(leaf: str, expression: str, shown: str | None = None) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise LoraProblem(f"{leaf} = {shown or expression}: not a regular expression ({error})") from error

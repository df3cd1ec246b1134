"""PEFT adapters on disk: which layers they adapt, with which ranks and scales, and whether they fit a model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_gkd.checkpoint_format.fingerprint import weights_fingerprint
from megatron_gkd.checkpoint_format.lora_layers import (
    DECODER,
    AdaptedLayer,
    BaseLayer,
    describe_joined,
    value_of_name,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model.json"
"""Written beside PEFT's files by this package: the fingerprint of the base model's weights."""
_PREFIX = "base_model.model."
_MUST_BE_FALSE = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layer_replication")

Shape = tuple[int, ...]


class AdapterProblem(ValueError):
    """Adapters on disk can't be used."""


def factor_name(hf_name: str, kind: str) -> str:
    """Return PEFT's name of a factor; `kind` is A or B."""
    return f"{_PREFIX}{hf_name}.lora_{kind}.weight"


@dataclass(frozen=True)
class ModuleFactors:
    """The factors of one module of the base: their names in the file, and the scale of their product B A."""

    a: str
    b: str
    scaling: float


@dataclass(frozen=True)
class AdapterFiles:
    """PEFT adapters in a folder.

    Attributes:
        config: the content of adapter_config.json.
        shapes: the shapes of the tensors by name.
        base: fingerprint of the base model's weights; None if it was not written.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    base: str | None

    @classmethod
    def open(cls, folder: Path) -> AdapterFiles:
        """Read the configuration and the headers.

        Raises:
            AdapterProblem: a file is missing or damaged.
        """
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise AdapterProblem(f"must be a folder of PEFT adapters; there is no {name} in it")
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            rank, alpha = int(config["r"]), float(config["lora_alpha"])
            own = folder / BASE
            base = json.loads(own.read_text(encoding="utf-8"))["weights"] if own.is_file() else None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise AdapterProblem(f"{CONFIG} can't be read ({type(error).__name__}: {error})") from error
        if rank < 1 or alpha <= 0:
            raise AdapterProblem(f"{CONFIG} has r = {rank} and lora_alpha = {alpha}; both must be above 0")
        try:
            with safe_open(folder / WEIGHTS, framework="np") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise AdapterProblem(f"{WEIGHTS} can't be read ({error})") from error
        return cls(folder, config, shapes, base)

    def require_fit(self, layers: Sequence[AdaptedLayer], base_shapes: Mapping[str, Shape] | None) -> None:
        """Compare the files with the adapters of a model.

        Args:
            layers: all adapted layers of the model.
            base_shapes: the shapes of the model's parameters by Hugging Face name; None: not known.

        Raises:
            AdapterProblem: they do not fit.
        """
        for problem in self._problems(layers, base_shapes):
            raise AdapterProblem(problem)

    def require_base(self, folder: Path) -> None:
        """Compare the base model that they were trained on, where it is known, with the weights in `folder`.

        Raises:
            AdapterProblem: it has other weights.
        """
        if self.base is not None and self.base != weights_fingerprint(folder):
            raise AdapterProblem(f"its adapters are of other weights than those in {folder}")

    def modules(self, base_shapes: Mapping[str, Shape]) -> dict[str, ModuleFactors]:
        """Return the factors for each weight of the base that has adapters, by its Hugging Face name.

        Raises:
            AdapterProblem: they are of a kind that can't be merged, or not of this base.
        """
        for problem in self._unsupported():
            raise AdapterProblem(problem)
        found = {}
        for name, shape in self.shapes.items():
            module, kind = _module_of(name)
            weight = f"{module}.weight"
            a, b = factor_name(module, "A"), factor_name(module, "B")
            if weight not in base_shapes:
                raise AdapterProblem(f"has the tensor {name}, but the model has no {weight}")
            if a not in self.shapes or b not in self.shapes:
                raise AdapterProblem(f"has {name} without the other factor of {module}")
            rank = self.shapes[a][0]
            expected = (rank, base_shapes[weight][1]) if kind == "A" else (base_shapes[weight][0], rank)
            if shape != expected:
                raise AdapterProblem(f"{name} is {list(shape)}; of this model it would be {list(expected)}")
            found[weight] = ModuleFactors(a, b, self._scaling(module, rank))
        return found

    def _scaling(self, hf_name: str, rank: int) -> float:
        config = self.config
        alpha = value_of_name(hf_name, "alpha_pattern", config.get("alpha_pattern") or {}, config["lora_alpha"])
        return alpha / (rank**0.5 if config.get("use_rslora") else rank)

    def _problems(self, layers: Sequence[AdaptedLayer], base_shapes: Mapping[str, Shape] | None) -> Iterator[str]:
        yield from self._unsupported()
        expected: set[str] = set()
        for layer in layers:
            names = {hf_name: factor_name(hf_name, "A") for hf_name in layer.base.hf_names}
            expected |= {factor_name(hf_name, kind) for hf_name in names for kind in "AB"}
            yield from self._missing(layer.base, names)
            for hf_name in layer.base.hf_names:
                yield from self._wrong_scale(layer, hf_name)
                if base_shapes is not None:
                    yield from self._wrong_shape(layer, hf_name, base_shapes)
        for name in self.shapes:
            if name not in expected:
                yield f"has the tensor {name}, which is of no layer that lora.target_modules names"

    def _unsupported(self) -> Iterator[str]:
        if self.config.get("peft_type", "LORA") != "LORA":
            yield f"holds adapters of the type {self.config['peft_type']}; must be LORA"
        for key in _MUST_BE_FALSE:
            if self.config.get(key):
                yield f"{CONFIG} has {key} = {self.config[key]}, which is not supported"
        if self.config.get("bias", "none") != "none":
            yield f"{CONFIG} has bias = {self.config['bias']}; must be none"

    def _missing(self, layer: BaseLayer, names: Mapping[str, str]) -> Iterator[str]:
        missing = [hf_name for hf_name, name in names.items() if name not in self.shapes]
        if missing and len(missing) < len(names):
            yield f"has no factors of {missing[0]}; {describe_joined(layer)}, so all must have them"
        elif missing:
            yield f"has no factors of {missing[0]}, which lora.target_modules names"
        for hf_name in names:
            if factor_name(hf_name, "B") not in self.shapes:
                yield f"has no tensor {factor_name(hf_name, 'B')}"

    def _wrong_scale(self, layer: AdaptedLayer, hf_name: str) -> Iterator[str]:
        rank = self.shapes[factor_name(hf_name, "A")][0]
        if rank != layer.rank:
            yield f"has rank {rank} for {hf_name}; lora.lora_rank (or rank_pattern) gives it {layer.rank}"
        scaling = self._scaling(hf_name, rank)
        if abs(scaling - layer.scaling) > 1e-6 * abs(layer.scaling):
            yield (
                f"multiplies the adapters of {hf_name} by {scaling:g}; lora.lora_alpha and lora_rank (or patterns, or "
                f"use_rslora) multiply them by {layer.scaling:g}"
            )

    def _wrong_shape(self, layer: AdaptedLayer, hf_name: str, base_shapes: Mapping[str, Shape]) -> Iterator[str]:
        for name, shape in _shapes_of_module(layer, hf_name, base_shapes).items():
            if self.shapes[name] != shape:
                yield f"{name} is {list(self.shapes[name])}; of this student it would be {list(shape)}"


def factor_shapes(layers: Sequence[AdaptedLayer], base_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the shapes of all factors of a model's adapters, by PEFT's names."""
    return {
        name: shape
        for layer in layers
        for hf_name in layer.base.hf_names
        for name, shape in _shapes_of_module(layer, hf_name, base_shapes).items()
    }


def count_parameters(layers: Sequence[AdaptedLayer], base_shapes: Mapping[str, Shape]) -> int:
    """Return how many parameters a model's adapters have; modules that are one matrix share the factor A."""
    shared = {
        factor_name(hf_name, "A"): (layer.base.name, hf_name.rpartition(".")[0])
        for layer in layers
        for hf_name in layer.base.hf_names
    }
    shapes = factor_shapes(layers, base_shapes)
    distinct = {shared.get(name, name): math.prod(shape) for name, shape in shapes.items()}
    return sum(distinct.values())


def _shapes_of_module(layer: AdaptedLayer, hf_name: str, base_shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    rows, columns = base_shapes[f"{hf_name}.weight"]
    return {factor_name(hf_name, "A"): (layer.rank, columns), factor_name(hf_name, "B"): (rows, layer.rank)}


def _module_of(name: str) -> tuple[str, str]:
    """Return the Hugging Face module of a tensor in WEIGHTS, and A or B.

    Raises:
        AdapterProblem: it is no factor.
    """
    match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.lora_([AB])\.weight", name)
    if match is None:
        raise AdapterProblem(
            f"has the tensor {name}, which is not a factor of a linear layer ({_PREFIX}*.lora_A.weight)"
        )
    return match[1], match[2]


def adapter_config(
    layers: Sequence[AdaptedLayer], all_layers: Sequence[BaseLayer], base: str, rank: int
) -> dict[str, Any]:
    """Return the content of adapter_config.json for a model's adapters.

    rsLoRA is written as plain LoRA of the same scale: peft 0.20 joins the gate and up of a mixture's experts into one
    factor of twice the rank and twice the alpha, which only plain LoRA's scale does not change.

    Args:
        layers: the adapted layers.
        all_layers: all layers of the model that can be adapted.
        base: path or hub id of the base model.
        rank: the rank of most layers.
    """
    usual = next((layer for layer in layers if layer.rank == rank), layers[0])
    ranks, alphas = {}, {}
    for layer in layers:
        for hf_name in layer.base.hf_names:
            if layer.rank != usual.rank:
                ranks[hf_name] = layer.rank
            if layer.alpha != usual.alpha:
                alphas[hf_name] = layer.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": usual.rank,
        "lora_alpha": usual.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": _target_modules(layers, all_layers),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "inference_mode": True,
    }


def _target_modules(layers: Sequence[AdaptedLayer], all_layers: Sequence[BaseLayer]) -> list[str]:
    """Return last parts of names where all modules with them are adapted, and whole names elsewhere.

    The last parts may also be those of modules in a multimodal model's tower.
    """
    adapted = {layer.base.name for layer in layers}
    is_text_model = all(name.startswith(f"{DECODER}.") for layer in all_layers for name in layer.hf_names)
    partly = {leaf for layer in all_layers if layer.name not in adapted or not is_text_model for leaf in layer.leaves}
    names = {
        hf_name if leaf in partly else leaf
        for layer in layers
        for hf_name in layer.base.hf_names
        for leaf in [hf_name.rpartition(".")[2]]
    }
    return sorted(names)

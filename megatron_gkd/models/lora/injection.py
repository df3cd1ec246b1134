"""Insert adapters into the chunks of a built model and freeze the model's own weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import nn

from megatron_gkd.checkpoint_format.lora_layers import AdaptedLayer, BaseLayer, LoraProblem, can_be_adapted
from megatron_gkd.errors import UserError
from megatron_gkd.models.lora.factors import (
    ADAPTER,
    Factor,
    factors_of,
    global_name,
    lora_modules,
    tower_factors,
)
from megatron_gkd.models.lora.initialization import initialize_factors
from megatron_gkd.models.lora.options import LoraOptions
from megatron_gkd.models.vision.parts import language_model, tower_layers
from megatron_gkd.runtime.mesh import Mesh

from mcore_bridge.tuners.lora import LoraParallelLinear


@dataclass(frozen=True)
class Adapters:
    """The adapters of one model.

    Attributes:
        layers: the adapted layers of the whole model, on any rank, in the model's order.
        base_layers: all layers of the whole model that can be adapted.
        options: the options that they were built with.
        factors: the factors on this rank.
    """

    layers: tuple[AdaptedLayer, ...]
    base_layers: tuple[BaseLayer, ...]
    options: LoraOptions
    factors: tuple[Factor, ...]


def inject_adapters(
    chunks: Sequence[nn.Module], mesh: Mesh, options: LoraOptions, num_experts: int, decoder: str
) -> Adapters:
    """Freeze the chunks and put new adapters around the layers that the options choose. All ranks must call it.

    Call it after the weights are read, and before shards are marked, experts prepared and buffers built.

    Args:
        chunks: the model's chunks on this rank.
        mesh: the process groups.
        options: which layers are adapted, and how.
        num_experts: of a layer of the model; 0 of a dense one.
        decoder: the module of the language model's layers in transformers.

    Raises:
        UserError: in all ranks; the options do not suit the model.
    """
    languages = [language_model(chunk) for chunk in chunks]
    places = {global_name(language, name): (language, name) for language in languages for name in _adaptable(language)}
    tower = {hf_name: (chunk, name, part) for chunk in chunks for part, name, hf_name in tower_layers(chunk)}
    base_layers = (
        *(BaseLayer(name, (name,), part=part) for name, part in _tower_of_first_stage(tower, mesh)),
        *(BaseLayer.from_name(name, num_experts, decoder) for name in _all_names(list(places), mesh)),
    )
    try:
        layers = options.rules.choose(base_layers)
        if mesh.layout.expert_tensor > 1 and any(layer.base.container for layer in layers):
            raise LoraProblem(
                "target_modules: experts take no adapters with parallel.expert_tensor_parallel_size > 1; set it to 1"
            )
    except LoraProblem as problem:  # equal in all ranks, which have the same names
        raise UserError(f"lora.{problem}") from problem
    for chunk in chunks:
        chunk.requires_grad_(False)
    for layer in layers:
        if layer.base.name in places:
            _wrap(*places[layer.base.name], layer, options)
    for language in languages:
        _mark_experts(language)
    factors = [*factors_of(languages, mesh.ep.rank())]
    for layer in layers:
        if layer.base.name in tower:
            chunk, name, _ = tower[layer.base.name]
            factors += tower_factors(layer.base.name, name, _wrap_in_tower(chunk, name, layer, options))
    initialize_factors(factors, options, mesh.tp.rank(), mesh.tp.size())
    return Adapters(layers, base_layers, options, tuple(factors))


def _adaptable(chunk: nn.Module) -> list[str]:
    return [name for name, _ in chunk.named_modules() if can_be_adapted(name)]


def _all_names(names: list[str], mesh: Mesh) -> list[str]:
    """Return the names of all pipeline stages' layers in the model's order."""
    parts: list[list[str]] = [[] for _ in range(mesh.pp.size())]
    dist.all_gather_object(parts, names, group=mesh.pp)
    # The sort is stable: within a layer the order stays.
    return sorted((name for part in parts for name in part), key=lambda name: int(name.split(".")[2]))


def _tower_of_first_stage(tower: Mapping[str, tuple[nn.Module, str, str]], mesh: Mesh) -> list[tuple[str, str]]:
    """Return name and part of the layers of vision tower and aligner, which the first pipeline stage has."""
    parts: list[list[tuple[str, str]]] = [[] for _ in range(mesh.pp.size())]
    own = [(hf_name, part) for hf_name, (_, _, part) in tower.items()]
    dist.all_gather_object(parts, own, group=mesh.pp)
    return parts[0]


def _wrap_in_tower(chunk: nn.Module, name: str, layer: AdaptedLayer, options: LoraOptions) -> Linear:
    """Put PEFT's adapter around a layer of transformers and return it."""
    parent, _, child = name.rpartition(".")
    owner = chunk.get_submodule(parent)
    base = getattr(owner, child)
    config = LoraConfig(lora_dropout=options.dropout, init_lora_weights=False)
    alpha: Any = layer.alpha  # an integer only by PEFT's annotation
    module = Linear(base, ADAPTER, config, r=layer.rank, lora_alpha=alpha)
    module.to(base.weight.device)
    _set_dtype(module, options.dtype or base.weight.dtype)
    setattr(owner, child, module)
    return module


def _set_dtype(module: Any, dtype: torch.dtype) -> None:
    for linear in (module.lora_A, module.lora_B):
        for parameter in linear.parameters():
            parameter.data = parameter.data.to(dtype)  # attributes stay


def _wrap(chunk: nn.Module, name: str, layer: AdaptedLayer, options: LoraOptions) -> None:
    parent, _, child = name.rpartition(".")
    owner = chunk.get_submodule(parent)
    module = LoraParallelLinear(
        getattr(owner, child),
        ADAPTER,
        r=layer.rank,
        lora_alpha=layer.alpha,
        lora_dropout=options.dropout,
        init_lora_weights=False,
    )
    if options.dtype is not None:
        _set_dtype(module, options.dtype)
    setattr(owner, child, module)


def _mark_experts(chunk: nn.Module) -> None:
    """Mark all factors of experts as sharded: the ranks of a tensor-parallel group have different experts' tokens.

    mcore-bridge 1.6.5 (tuners/lora.py) builds fc1's A and fc2's B with `parallel_mode=None`, which counts as
    replicated: the gradient's norm would include them from tensor-parallel rank 0 only.
    """
    for _, module in lora_modules(chunk):
        if module.is_grouped:
            for linear in (module.lora_A, module.lora_B):
                for parameter in linear.parameters():
                    parameter.tensor_model_parallel = True

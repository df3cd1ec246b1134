"""Insert adapters into the chunks of a built model and freeze the model's own weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megatron_gkd.checkpoint_format.lora_layers import AdaptedLayer, BaseLayer, LoraProblem, can_be_adapted
from megatron_gkd.errors import UserError
from megatron_gkd.models.lora.factors import ADAPTER, Factor, factors_of, global_name, lora_modules
from megatron_gkd.models.lora.initialization import initialize_factors
from megatron_gkd.models.lora.options import LoraOptions
from megatron_gkd.runtime.mesh import Mesh

from mcore_bridge.tuners.lora import LoraParallelLinear
from megatron.core.models.gpt import GPTModel


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


def inject_adapters(chunks: Sequence[GPTModel], mesh: Mesh, options: LoraOptions, num_experts: int) -> Adapters:
    """Freeze the chunks and put new adapters around the layers that the options choose. All ranks must call it.

    Call it after the weights are read, and before shards are marked, experts prepared and buffers built.

    Raises:
        UserError: in all ranks; the options do not suit the model.
    """
    places = {global_name(chunk, name): (chunk, name) for chunk in chunks for name in _adaptable(chunk)}
    base_layers = _all_layers(list(places), mesh, num_experts)
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
    for chunk in chunks:
        _mark_experts(chunk)
    factors = tuple(factors_of(chunks, mesh.ep.rank()))
    initialize_factors(factors, options, mesh.tp.rank(), mesh.tp.size())
    return Adapters(layers, base_layers, options, factors)


def _adaptable(chunk: nn.Module) -> list[str]:
    return [name for name, _ in chunk.named_modules() if can_be_adapted(name)]


def _all_layers(names: list[str], mesh: Mesh, num_experts: int) -> tuple[BaseLayer, ...]:
    """Return the layers of all pipeline stages in the model's order."""
    parts: list[list[str]] = [[] for _ in range(mesh.pp.size())]
    dist.all_gather_object(parts, names, group=mesh.pp)
    # The sort is stable: within a layer the order stays.
    ordered = sorted((name for part in parts for name in part), key=lambda name: int(name.split(".")[2]))
    return tuple(BaseLayer.from_name(name, num_experts) for name in ordered)


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
        for linear in (module.lora_A, module.lora_B):
            for parameter in linear.parameters():
                parameter.data = parameter.data.to(options.dtype)  # attributes stay
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

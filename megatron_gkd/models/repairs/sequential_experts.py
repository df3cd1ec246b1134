"""Experts that are modules of their own (`moe_grouped_gemm = false`), which mcore-bridge neither reads nor writes."""

from __future__ import annotations

from types import SimpleNamespace

from torch import nn

from megatron.core.transformer.moe.experts import SequentialMLP


def expose_expert_weights(chunk: nn.Module) -> None:
    """Give the experts of a layer the attributes by which mcore-bridge finds the weights of grouped ones."""
    for experts in chunk.modules():
        if isinstance(experts, SequentialMLP):
            for name in ("linear_fc1", "linear_fc2"):
                layers = [getattr(expert, name) for expert in experts.local_experts]
                found = {f"weight{number}": layer.weight for number, layer in enumerate(layers)}
                found |= {
                    f"bias{number}": layer.bias
                    for number, layer in enumerate(layers)
                    if isinstance(getattr(layer, "bias", None), nn.Parameter)
                }
                vars(experts)[name] = SimpleNamespace(**found)  # no module, whose parameters would count twice

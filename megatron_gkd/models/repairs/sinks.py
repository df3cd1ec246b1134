"""Transformer Engine's attention sinks are sharded over tensor-parallel ranks without the mark that says so."""

from __future__ import annotations

from torch import nn

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes


def mark_sinks(chunk: nn.Module) -> None:
    """Mark attention sinks as sharded, or the gradient's norm includes those of one tensor-parallel rank only."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("core_attention.softmax_offset") and not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

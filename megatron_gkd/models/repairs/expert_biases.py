"""Biases of experts (GPT-OSS) in the gradient's norm."""

from __future__ import annotations

from torch import nn

from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.moe.experts import TEGroupedMLP


def mark_expert_biases(chunk: nn.Module) -> None:
    """Mark experts' biases like their weights, so that the gradient's norm includes those of every rank.

    Without the mark they count as replicas of those of the first tensor-parallel rank, which has other experts under
    expert parallelism.
    """
    for experts in chunk.modules():
        if isinstance(experts, TEGroupedMLP):
            for name, parameter in experts.named_parameters():
                if name.split(".")[-1].startswith("bias") and not hasattr(parameter, "tensor_model_parallel"):
                    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)

"""Set up a mixture of experts so that its gradients under every layout are those of one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.transformer_layer import TransformerLayer


def prepare_experts(chunk: nn.Module) -> None:
    """Prepare the mixture-of-experts layers of a built chunk for training. Does nothing to a dense one."""
    for layer in chunk.modules():
        if isinstance(getattr(layer, "mlp", None), MoELayer):
            _reduce_over_expert_group(layer.mlp)
            layer.register_forward_pre_hook(_set_num_labels, with_kwargs=True)


def freeze_routers(chunk: nn.Module) -> None:
    """Leave the routers' weights and biases out of the training; see `family_settings` for the correction biases."""
    for module in chunk.modules():
        if isinstance(module, Router):
            module.requires_grad_(False)


def count_router_parameters(config: TransformerConfig, has_experts_in: Sequence[bool]) -> int:
    """Return the number of the routers' parameters.

    Args:
        config: of the model.
        has_experts_in: for each of its layers, whether it is a mixture of experts.
    """
    rows = config.hidden_size + (1 if config.add_bias_linear else 0)
    return sum(has_experts_in) * (config.num_moe_experts or 0) * rows


def _reduce_over_expert_group(moe: MoELayer) -> None:
    """Mark the experts' parameters to be reduced over the expert-data-parallel group.

    Megatron-Core 0.16 marks those of its Transformer Engine layers only under expert parallelism. Without it they are
    reduced over the data-parallel group, which leaves out the tensor-parallel ranks although each of these has its own
    tokens for its experts. (0.19 marks them too where expert and plain tensor parallelism differ.)
    """
    for parameter in moe.experts.parameters():
        parameter.allreduce = False


def _set_num_labels(layer: TransformerLayer, args: tuple, kwargs: dict[str, Any]) -> None:
    """Set the microbatch's number of labels in the router, whose balancing loss is weighted by it.

    The number comes with the packing parameters, since a layer gets these again when it is recomputed.
    """
    packing = kwargs.get("packed_seq_params")
    layer.mlp.router.num_labels = getattr(packing, "num_labels", None)

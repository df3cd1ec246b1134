"""The gradients of a gated delta net's norms under tensor parallelism."""

from __future__ import annotations

from torch import Tensor, nn

from mcore_bridge.model.modules.gated_delta_net import GatedDeltaNet


def sum_delta_net_norm_gradients(chunk: nn.Module, size: int, *, is_sequence_parallel: bool) -> None:
    """Let Megatron sum the gradients of these norms over tensor-parallel ranks where, and only where, they are parts.

    Under sequence parallelism mcore-bridge gathers the tokens before the input norm, so that each rank has its whole
    gradient, which its mark has summed. The norm behind the rule sees the heads of its rank alone, and without sequence
    parallelism nothing sums its gradient.

    Args:
        chunk: a built chunk.
        size: number of tensor-parallel ranks.
        is_sequence_parallel: whether the layers between are sequence-parallel.
    """
    for module in chunk.modules():
        if not isinstance(module, GatedDeltaNet):
            continue
        if is_sequence_parallel:
            # With a decoupled projection the input norm is a module before this one, of this rank's tokens.
            gamma = getattr(getattr(module, "in_proj", None), "layer_norm_weight", None)
            if gamma is not None:
                gamma.sequence_parallel = False
        else:
            _sum_over_ranks(module.out_norm.weight, size)


def _sum_over_ranks(weight: nn.Parameter, size: int) -> None:
    """Mark a parameter to be averaged, the one reduction that Megatron has here, and multiply its gradient before."""
    vars(weight)["average_gradients_across_tp_domain"] = True

    def multiply(gradient: Tensor) -> Tensor:
        return gradient * size

    weight.register_hook(multiply)

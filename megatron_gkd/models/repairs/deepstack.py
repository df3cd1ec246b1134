"""The gradient of Qwen3-VL's vision tower under sequence parallelism."""

from __future__ import annotations

from typing import Any

from torch import nn

from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region


def sum_deepstack_gradients(chunk: nn.Module) -> None:
    """Sum the gradients of the deepstack features, which are added to hidden states, over tensor-parallel ranks.

    Under sequence parallelism each rank adds the features of its own tokens, so that their gradient is a part, beside
    that of the image embeddings, which is whole on each rank.
    """
    tower: Any = getattr(getattr(chunk, "visual", None), "visual", None)
    if hasattr(tower, "deepstack_merger_list"):
        tower.register_forward_hook(_copy_features)


def _copy_features(tower: nn.Module, args: Any, output: Any) -> Any:
    """Pass the features on; backward sums their gradients."""
    output.deepstack_features = [copy_to_tensor_model_parallel_region(x) for x in output.deepstack_features]
    return output

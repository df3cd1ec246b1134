"""GLM-4's norm behind the feed-forward layer in distributed checkpoints."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn

from mcore_bridge.model.gpts.glm4 import Glm4MLP


def number_norm_replicas(chunk: nn.Module) -> None:
    """Number the replicas of this norm by tensor-parallel rank: each would be the first, and none could be saved."""
    for mlp in chunk.modules():
        if isinstance(mlp, Glm4MLP):
            vars(mlp)["sharded_state_dict"] = MethodType(_sharded_state_dict, mlp)


def _sharded_state_dict(self: Any, prefix: str = "", *args: Any, **options: Any) -> dict[str, Any]:
    state = Glm4MLP.sharded_state_dict(self, prefix, *args, **options)
    for name, tensor in state.items():
        if name.startswith(f"{prefix}post_mlp_layernorm."):
            layers, _, data = tensor.replica_id
            tensor.replica_id = (layers, self.tp_group.rank(), data)
    return state

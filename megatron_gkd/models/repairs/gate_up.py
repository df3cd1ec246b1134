"""GLM-4's dense layers have one matrix for gate and up projection: mcore-bridge reads that, but writes two."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor

from mcore_bridge.model.gpts.glm4 import Glm4Bridge


def export_gate_up_as_one(bridge: Any) -> None:
    """Let the bridge of a GLM-4 or a GLM-4V write `gate_up_proj`, as transformers does. Idempotent."""
    if isinstance(bridge, Glm4Bridge) and "_set_mlp_state" not in vars(bridge):
        bridge._set_mlp_state = MethodType(_set_mlp_state, bridge)


def _set_mlp_state(
    self: Glm4Bridge, mlp: Any, hf_state: dict[str, Any], prefix: str, layer: int, to_mcore: bool, **options: Any
) -> dict[str, Tensor]:
    state = Glm4Bridge._set_mlp_state(self, mlp, hf_state, prefix, layer, to_mcore, **options)
    gate = state.pop(f"{prefix}gate_proj.weight", None)
    if gate is not None:  # None when reading, and on ranks that do not write
        state[f"{prefix}gate_up_proj.weight"] = torch.cat([gate, state.pop(f"{prefix}up_proj.weight")])
    return state

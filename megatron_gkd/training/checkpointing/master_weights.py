"""Save and load fp32 master weights that the precision-aware optimizer stores in another way.

Megatron-Core 0.16.1 takes them as Transformer Engine's FusedAdam stores them: 16-bit remainders of bf16 weights would
be saved as if they were weights, and can't be loaded. fp32 parameters have master weights that are never updated. With
this, a checkpoint holds fp32 weights and moments whatever optimizer wrote it, and any other can continue from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_gkd.runtime.transformer_engine.fused_adam import MASTER, join_remainders, split_master
from megatron_gkd.training.hybrid_optimizer import HostOptimizer

from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


def restore_master_weights() -> None:
    """Patch the class `DistributedOptimizer`, once."""
    get = DistributedOptimizer._get_main_param_and_optimizer_states
    set_ = DistributedOptimizer._set_main_param_and_optimizer_states

    def get_states(self: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
        if not _holds_masters(self):
            return get(self, parameter)
        shard = _shard(self, parameter)
        tensors = {name: self.optimizer.get_unscaled_state(shard, name) for name in self.optimizer.state[shard]}
        stored = tensors.pop(MASTER, shard)
        if shard.dtype == torch.float32:
            stored = shard
        elif stored.dtype == torch.int16:
            stored = join_remainders(shard.detach(), stored)
        return {**tensors, "param": stored}

    def set_states(self: DistributedOptimizer, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        if not _holds_masters(self):
            set_(self, parameter, tensors)
            return
        shard, adam = _shard(self, parameter), self.optimizer
        for name, value in tensors.items():
            if name == "step":
                adam.state[shard][name] = value
            elif name != "param":
                adam.set_scaled_state(shard, name, value.to(shard.device, torch.float32))
            else:
                _set_master(adam, shard, value.to(shard.device, torch.float32))

    DistributedOptimizer._get_main_param_and_optimizer_states = get_states
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _set_master(adam: Any, shard: Tensor, weight: Tensor) -> None:
    if shard.dtype == torch.float32:
        shard.detach().copy_(weight)
    elif adam.store_param_remainders and shard.dtype == torch.bfloat16:
        # The parameter is set too: it may have been saved by an optimizer that rounds to the nearest even.
        split_master(weight, shard.detach(), adam.state[shard][MASTER])
        return
    adam.set_scaled_state(shard, MASTER, weight)


def _holds_masters(optimizer: DistributedOptimizer) -> bool:
    """Return whether Transformer Engine's FusedAdam, or its fallback, has the master weights."""
    return optimizer.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and not isinstance(
        optimizer.optimizer, HostOptimizer
    )


def _shard(optimizer: DistributedOptimizer, parameter: Tensor) -> Tensor:
    group, place = optimizer.model_param_group_index_map[parameter]
    return optimizer.optimizer.param_groups[group]["params"][place]

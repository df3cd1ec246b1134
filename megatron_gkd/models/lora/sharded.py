"""Describe the factors as Megatron's sharded tensors, for checkpoints that any layout can load.

mcore-bridge's own `sharded_state_dict` (1.6.5, tuners/lora.py) splits fc1's B without regard to its halves, gate and
up, and gives replicated factors the replica number 0 on every tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megatron_gkd.models.lora.factors import Factor
from megatron_gkd.runtime.mesh import Mesh

from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint


def sharded_factors(factors: Iterable[Factor], mesh: Mesh) -> dict[str, Any]:
    """Return a sharded tensor for each factor on this rank, by the factor's name in the whole model."""
    return {factor.name: _shard(factor, mesh) for factor in factors}


def _shard(factor: Factor, mesh: Mesh) -> Any:
    if factor.expert is not None:  # the ranks with the same experts have replicas
        replica = (0, 0, mesh.expert_dp.rank())
        return make_sharded_tensor_for_checkpoint(factor.parameter, factor.name, replica_id=replica)
    groups = {"tp_group": mesh.tp, "dp_cp_group": mesh.dp_cp}
    if factor.sharded_dim is None:
        return make_sharded_tensor_for_checkpoint(factor.parameter, factor.name, **groups)
    shard = make_tp_sharded_tensor_for_checkpoint(factor.parameter, factor.name, factor.sharded_dim, **groups)
    return apply_swiglu_sharded_factory(shard, ()) if factor.has_halves else shard

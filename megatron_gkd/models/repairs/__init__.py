"""Repairs of what mcore-bridge and Megatron-Core compute or export wrongly for some families of models.

Each is a function of its own file, which does nothing to models that it does not concern; `docs/upstream_defects.md`
lists the defects. None of them raises an error where it is not repaired.
"""

from __future__ import annotations

from torch import nn

from megatron_gkd.models.repairs.deepstack import sum_deepstack_gradients
from megatron_gkd.models.repairs.delta_net import sum_delta_net_norm_gradients
from megatron_gkd.models.repairs.expert_biases import mark_expert_biases
from megatron_gkd.models.repairs.gate_up import export_gate_up_as_one
from megatron_gkd.models.repairs.latent_norms import set_latent_norm_eps
from megatron_gkd.models.repairs.norm_replicas import number_norm_replicas
from megatron_gkd.models.repairs.sequential_experts import expose_expert_weights
from megatron_gkd.models.repairs.sinks import mark_sinks

from mcore_bridge import ModelConfig


def repair(chunk: nn.Module, config: ModelConfig) -> None:
    """Repair a chunk as mcore-bridge built it, and the bridge of its configuration.

    Call it before the weights are read and before buffers of gradients are built. All ranks must call it.
    """
    export_gate_up_as_one(config.bridge)
    expose_expert_weights(chunk)
    mark_expert_biases(chunk)
    set_latent_norm_eps(chunk)
    mark_sinks(chunk)
    number_norm_replicas(chunk)
    if config.tensor_model_parallel_size > 1:
        sum_delta_net_norm_gradients(
            chunk, config.tensor_model_parallel_size, is_sequence_parallel=config.sequence_parallel
        )
        if config.sequence_parallel:
            sum_deepstack_gradients(chunk)

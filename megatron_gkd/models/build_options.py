"""Options of a model, and the configuration of Megatron-Core that they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.family_settings import family_settings
from megatron_gkd.models.lora.options import LoraOptions
from megatron_gkd.models.vision.parts import Part
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout

from mcore_bridge import ModelConfig, hf_to_mcore_config
from megatron.core.transformer.enums import AttnBackend


@dataclass(frozen=True)
class BuildOptions:
    """Options of a model beside its checkpoint and its mesh; None for the default of Megatron or of the checkpoint.

    Attributes:
        dtype: dtype of the parameters and the computation.
        attn: "auto", "flash", "fused" or "sdpa".
        virtual_pipeline: number of chunks on each rank of the pipeline; None for one.
        recompute_granularity: Megatron's option of this name, as are the next two.
        recompute_method: "uniform" or "block".
        recompute_num_layers: number of layers that are recomputed together.
        moe_aux_loss_coeff: coefficient of the experts' load-balancing loss; None for the checkpoint's.
        lora: options of the adapters; None to train all parameters.
        frozen: the parts of a multimodal model that are not trained.
        recomputes_tower: whether the vision tower's activations are computed again in the backward pass.
    """

    dtype: torch.dtype = torch.float32
    attn: str = "auto"
    virtual_pipeline: int | None = None
    recompute_granularity: str | None = None
    recompute_method: str | None = None
    recompute_num_layers: int | None = None
    moe_aux_loss_coeff: float | None = None
    lora: LoraOptions | None = None
    frozen: frozenset[Part] = frozenset()
    recomputes_tower: bool = False


def build_config(checkpoint: Checkpoint, layout: Layout, options: BuildOptions) -> ModelConfig:
    """Return the configuration of Megatron-Core's model of a checkpoint.

    Args:
        checkpoint: the checkpoint.
        layout: how the model is sharded.
        options: how it is built.
    """
    family = {**hf_to_mcore_config(checkpoint.config), **family_settings(checkpoint)}
    if checkpoint.is_moe:
        coefficient = options.moe_aux_loss_coeff
        family["moe_aux_loss_coeff"] = checkpoint.router_aux_loss_coef if coefficient is None else coefficient
    return ModelConfig(
        params_dtype=options.dtype,
        bf16=options.dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=options.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert if checkpoint.is_moe else 1,
        expert_tensor_parallel_size=layout.expert_tensor if checkpoint.is_moe else None,
        sequence_parallel=layout.sequence_parallel,
        attention_backend=AttnBackend[options.attn] if options.attn != "sdpa" else AttnBackend.auto,
        recompute_granularity=options.recompute_granularity,
        recompute_method=options.recompute_method,
        recompute_num_layers=options.recompute_num_layers,
        calculate_per_token_loss=True,
        use_cpu_initialization=portability.builds_on_host(),
        # Kernels of Apex and Transformer Engine, which may be absent.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        # The plain schedule sends the shapes with the tensors. The interleaved one can't: between two stages the
        # messages of both directions would be mixed up; its microbatches have one length (`StepLoader`).
        variable_seq_lengths=options.virtual_pipeline is None,
        overlap_p2p_comm=options.virtual_pipeline is not None and portability.sends_are_stream_ordered(),
        batch_p2p_comm=False,
        **family,
    )

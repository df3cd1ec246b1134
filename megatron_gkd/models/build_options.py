"""Options of a model, and the configuration of Megatron-Core that they make."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_gkd.config.stages import Stages
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.extra_fields import require_extra_fields
from megatron_gkd.models.family_settings import family_settings
from megatron_gkd.models.fp8 import choose_fp8
from megatron_gkd.models.fusions import choose_fusions
from megatron_gkd.models.lora.options import LoraOptions
from megatron_gkd.models.module_options import ModuleOptions
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
        recompute_modules: the modules of selective recomputing; empty for Megatron's default.
        stages: the layers of each pipeline stage.
        modules: options of Megatron's modules.
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
    recompute_modules: tuple[str, ...] = ()
    stages: Stages = field(default_factory=Stages)
    modules: ModuleOptions = field(default_factory=ModuleOptions)
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
    modules = options.modules
    settings: dict[str, Any] = {
        **_layout_fields(layout, options, is_moe=checkpoint.is_moe),
        **_numeric_fields(options),
        **(modules.experts.fields() if checkpoint.is_moe else {}),
        **choose_fusions(modules.fusions, family, is_trained=modules.is_trained),
        **choose_fp8(modules.fp8, family, options.dtype, layout),
        "use_cpu_initialization": portability.builds_on_host(),
        "calculate_per_token_loss": True,
        **family,
    }
    require_extra_fields(modules.extra, settings)
    return _build({**settings, **modules.extra})


def _build(settings: dict[str, Any]) -> ModelConfig:
    """Return the configuration of `settings`, in which shapes are sent with tensors under every token dispatcher.

    Megatron refuses the all-gather dispatcher there, since its own works with tokens of equal numbers alone; see
    `runtime.token_gathering`.
    """
    varies = settings["variable_seq_lengths"]
    gathers = settings.get("moe_token_dispatcher_type") == "allgather"
    config = ModelConfig(**{**settings, "variable_seq_lengths": varies and not gathers})
    config.variable_seq_lengths = varies
    return config


def _layout_fields(layout: Layout, options: BuildOptions, *, is_moe: bool) -> dict[str, Any]:
    """Return Megatron's fields of the parallel sizes, of the pipeline and of its messages."""
    is_interleaved = options.virtual_pipeline is not None
    return {
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": options.virtual_pipeline,
        "context_parallel_size": layout.context,
        "expert_model_parallel_size": layout.expert if is_moe else 1,
        "expert_tensor_parallel_size": layout.expert_tensor if is_moe else None,
        "sequence_parallel": layout.sequence_parallel,
        "num_layers_in_first_pipeline_stage": options.stages.first,
        "num_layers_in_last_pipeline_stage": options.stages.last,
        "pipeline_model_parallel_layout": options.stages.layout,
        # The plain schedule sends the shapes with the tensors. The interleaved one can't: between two stages the
        # messages of both directions would be mixed up; its microbatches have one length (`StepLoader`).
        "variable_seq_lengths": not is_interleaved,
        "overlap_p2p_comm": is_interleaved and portability.sends_are_stream_ordered(),
        "batch_p2p_comm": False,
    }


def _numeric_fields(options: BuildOptions) -> dict[str, Any]:
    """Return Megatron's fields of the types, the attention and the recomputing."""
    return {
        "params_dtype": options.dtype,
        "bf16": options.dtype == torch.bfloat16,
        "attention_backend": AttnBackend[options.attn] if options.attn != "sdpa" else AttnBackend.auto,
        "recompute_granularity": options.recompute_granularity,
        "recompute_method": options.recompute_method,
        "recompute_num_layers": options.recompute_num_layers,
        "recompute_modules": list(options.recompute_modules) or None,
    }

"""The section `parallel`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_gkd.config.schema.base import Section, as_sequence

RecomputedModule = Literal["core_attn", "moe_act", "layernorm", "mla_up_proj", "mlp", "moe", "shared_experts"]


class ParallelSection(Section):
    """How the models are laid out over the processes; the names are Megatron-Core's."""

    tensor_model_parallel_size: int = Field(1, ge=1, description="ranks that share each layer's matrices")
    pipeline_model_parallel_size: int = Field(1, ge=1, description="stages that the layers are split into")
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, ge=2, description="model chunks per pipeline rank (interleaved schedule); the student's only"
    )
    context_parallel_size: int = Field(1, ge=1, description="ranks that share each sequence's tokens")
    expert_model_parallel_size: int = Field(1, ge=1, description="ranks that the experts are spread over")
    expert_tensor_parallel_size: int = Field(1, ge=1, description="ranks that share each expert's matrices")
    decoder_first_pipeline_num_layers: int | None = Field(
        None, ge=1, description="layers on the student's first stage; the others share the rest; null: equal shares"
    )
    decoder_last_pipeline_num_layers: int | None = Field(
        None, ge=1, description="layers on the student's last stage; the others share the rest; null: equal shares"
    )
    pipeline_model_parallel_layout: str | None = Field(
        None,
        min_length=1,
        description="the layers of each of the student's stages in Megatron-Core's notation (E: embedding, t: decoder "
        "layer, L: loss, |: next stage): Et*3|t*4|t*4|t*3L",
    )
    sequence_parallel: bool = Field(
        False, description="shard the activations between tensor-parallel regions; off where tensor parallelism is 1"
    )
    distributed_optimizer: bool = Field(True, description="shard the optimizer's state over data-parallel ranks")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while the backward pass runs")
    overlap_param_gather: bool = Field(False, description="gather parameters while the forward pass runs")
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None, description="recompute activations in the backward pass: whole layers, or the attention core only"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="full recompute: layers in equal groups, or the first layers of each stage"
    )
    recompute_num_layers: int | None = Field(
        None, ge=1, description="full recompute: layers to a group (uniform), or how many layers (block)"
    )

    recompute_modules: Annotated[tuple[RecomputedModule, ...], BeforeValidator(as_sequence)] = Field(
        (), description="selective recompute: the modules; empty: core_attn"
    )

    @property
    def effective_sequence_parallel(self) -> bool:
        """`sequence_parallel`, where there are tensor-parallel ranks for it to mean something."""
        return self.sequence_parallel and self.tensor_model_parallel_size > 1

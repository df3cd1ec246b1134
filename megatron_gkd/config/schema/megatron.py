"""The section `megatron`."""

from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_gkd.config.schema.base import Section

Switch = Literal["auto", "on", "off"]
_SWITCHES = (
    "gradient_accumulation_fusion",
    "masked_softmax_fusion",
    "bias_swiglu_fusion",
    "apply_rope_fusion",
    "moe_permute_fusion",
)
Fp8Format = Literal["e4m3", "hybrid"]
Fp8Recipe = Literal["tensorwise", "delayed", "mxfp8", "blockwise"]


class MegatronSection(Section):
    """Options of Megatron-Core's modules, for student and teachers; the names are Megatron-Core's."""

    gradient_accumulation_fusion: Switch = Field(
        "auto", description="add weight gradients to their buffers in the kernel; auto: where its kernel is installed"
    )
    masked_softmax_fusion: Switch = Field(
        "auto", description="one kernel for scaling, mask and softmax of unfused attention; auto: where it is installed"
    )
    bias_swiglu_fusion: Switch = Field("auto", description="one kernel for SwiGLU; auto: where the model has it")
    apply_rope_fusion: Switch = Field(
        "auto", description="one kernel for rotary embeddings; auto: where Transformer Engine has it"
    )
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = Field(
        "alltoall", description="how tokens reach the ranks of their experts"
    )
    moe_permute_fusion: Switch = Field(
        "auto", description="one kernel to sort tokens by expert; auto: where Transformer Engine has it"
    )
    moe_grouped_gemm: bool = Field(True, description="one grouped product for all experts of a rank")
    moe_router_dtype: Literal["fp32", "fp64"] | None = Field(
        "fp32", description="type of the router's scores; null: that of the model"
    )
    moe_z_loss_coeff: float | None = Field(
        None, ge=0, description="weight of the router's z-loss, which keeps its scores small; null: none"
    )
    moe_shared_expert_overlap: bool = Field(
        False, description="compute the shared expert while the tokens of the others are sent; with alltoall"
    )
    freeze_moe_router: bool = Field(False, description="leave the student's routers as they are")
    fp8_format: Fp8Format | None = Field(
        None, description="compute the student's linear layers in FP8 by Transformer Engine; null: in train.dtype"
    )
    fp8_recipe: Fp8Recipe = Field("delayed", description="fp8_format: how FP8 values are scaled")
    megatron_extra_kwargs: dict[str, Any] = Field(
        {}, description="further fields of Megatron-Core's TransformerConfig for the student, by their names there"
    )

    @field_validator(*_SWITCHES, mode="before")
    @classmethod
    def _read_switch(cls, value: Any) -> Any:
        """Return the text that YAML, in which `on` and `off` are booleans, has read as one."""
        return ("on" if value else "off") if isinstance(value, bool) else value

"""The section `lora`."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from megatron_gkd.config.schema.base import ModuleName, PathText, Section, as_sequence


class LoraSection(Section):
    """Low-rank adapters in place of training all parameters (Hu et al. 2021, arXiv:2106.09685)."""

    lora_rank: int = Field(8, ge=1, description="rows of the factors A and columns of the factors B")
    lora_alpha: float = Field(32.0, gt=0, description="the adapters' output is multiplied by lora_alpha / lora_rank")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout of the adapters' input, in training")
    lora_bias: Literal["none"] = Field("none", description="the biases are not trained")
    target_modules: Annotated[tuple[ModuleName, ...], BeforeValidator(as_sequence)] = Field(
        ("all-linear",),
        min_length=1,
        description="layers with adapters: all-linear (attention, MLP and experts), Hugging Face names (q_proj, k_proj "
        "and v_proj together, o_proj, gate_proj and up_proj together, down_proj, experts) or Megatron-Core's "
        "(linear_qkv, linear_proj, linear_fc1, linear_fc2)",
    )
    target_regex: str | None = Field(
        None, description="in place of target_modules: an expression that matches whole module names"
    )
    modules_to_save: Annotated[tuple[ModuleName, ...], BeforeValidator(as_sequence)] = Field(
        (), description="modules to train whole beside the adapters; not supported"
    )
    init_lora_weights: str = Field(
        "kaiming", description="first values of the factors A: kaiming (uniform) or gaussian; B begins as zeros"
    )
    use_rslora: bool = Field(False, description="multiply by lora_alpha / sqrt(lora_rank) instead")
    use_dora: bool = Field(False, description="weight-decomposed adapters; not supported")
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        {}, description="other ranks by Hugging Face names, as PEFT matches them (layers.0.mlp.down_proj: 16)"
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="other alphas by Hugging Face names, as PEFT matches them"
    )
    lora_dtype: Literal["bf16", "fp32"] | None = Field(
        None, description="type of the adapters; null: train.dtype. The optimizer has fp32"
    )
    merge_dtype: Literal["bf16", "fp32"] | None = Field(
        None,
        description="vllm and vllm_server: type of the layers with merged adapters that the engine gets; fp32 keeps "
        "the small updates that bf16 rounds away, and has vLLM compute in fp32; null: train.dtype",
    )
    adapters: PathText | None = Field(None, description="folder of PEFT adapters to start from")
    merge_lora: bool = Field(
        False,
        description="export a whole Hugging Face checkpoint with the adapters merged, in output_dir/hf, beside the "
        "PEFT adapters, which are always in output_dir/adapters",
    )

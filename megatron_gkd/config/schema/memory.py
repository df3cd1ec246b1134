"""The section `memory`."""

from typing import Literal

from pydantic import Field

from megatron_gkd.config.schema.base import Section

MasterDtype = Literal["fp32", "fp16"]
GradientDtype = Literal["fp32", "bf16"]
MomentDtype = Literal["fp32", "fp16", "bf16", "fp8"]


class MemorySection(Section):
    """What is kept in device memory, and in which type; the names of the optimizer's keys are Megatron-Core's."""

    offload_model: bool = Field(
        False,
        description="rollout.engine vllm: keep the student's weights in page-locked host memory while vLLM samples "
        "with its own, and free the gradient buffers",
    )
    offload_optimizer: bool = Field(
        False,
        description="rollout.engine vllm or megatron: keep the optimizer's state in page-locked host memory while the "
        "student samples, and free the gradient buffers",
    )
    optimizer_cpu_offload: bool = Field(
        False,
        description="keep the optimizer's state in host memory, and update the weights there in fp32; needs "
        "parallel.distributed_optimizer",
    )
    optimizer_offload_fraction: float = Field(
        1.0, gt=0, le=1, description="optimizer_cpu_offload: share of the parameters whose state is in host memory"
    )
    use_precision_aware_optimizer: bool = Field(
        False,
        description="keep the optimizer's state in the types below, and of fp32 weights only the bits that bf16 "
        "weights lack; needs parallel.distributed_optimizer and bf16 weights",
    )
    main_params_dtype: MasterDtype = Field(
        "fp32", description="precision-aware: type of the optimizer's copy of the weights"
    )
    main_grads_dtype: GradientDtype = Field(
        "fp32", description="precision-aware, optimizer_cpu_offload: type that gradients are summed and reduced in"
    )
    exp_avg_dtype: MomentDtype = Field("fp32", description="precision-aware: type of Adam's first moment")
    exp_avg_sq_dtype: MomentDtype = Field("fp32", description="precision-aware: type of Adam's second moment")

"""Layouts and rollout engines that some models do not have."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_gkd.checkpoint_format.model_shape import ModelShape


def layout_problems(shape: ModelShape, model: str, *, context: int, expert_tensor: int) -> Iterator[str]:
    """Yield one line for each size of a layout that Megatron-Core 0.16 refuses for a model.

    Args:
        shape: of the model.
        model: its name in the lines.
        context: context-parallel ranks.
        expert_tensor: ranks of expert tensor parallelism.
    """
    if shape.delta_heads and context > 1:
        yield (
            f"parallel.context_parallel_size = {context}: must be 1 with the gated delta nets of {model}, for which "
            "Megatron-Core 0.16 has no context parallelism"
        )
    if shape.has_expert_biases and expert_tensor > 1:
        yield (
            f"parallel.expert_tensor_parallel_size = {expert_tensor}: must be 1, as Megatron-Core 0.16 does not split "
            f"experts with biases, which {model} has; expert_model_parallel_size can be more"
        )


def embedded_engine_problems(shape: ModelShape, model: str) -> Iterator[str]:
    """Yield a line if the embedded rollout engine, which keeps keys and values, can't decode with a model."""
    if shape.delta_heads:
        yield (
            "rollout.engine = megatron: must be vllm or vllm_server with the gated delta nets of "
            f"{model}, of which the embedded engine keeps no states"
        )


def vllm_problems(shape: ModelShape, model: str, *, engine: str, weight_sync: str) -> Iterator[str]:
    """Yield a line if vLLM, which opens a student's files and then gets its weights, can't load these into a model.

    Args:
        shape: of the student.
        model: its name in the line.
        engine: the recipe's key.
        weight_sync: the recipe's key.
    """
    if shape.is_quantized and (engine == "vllm" or weight_sync != "lora"):
        yield (
            f"rollout.engine = {engine}: must be megatron with the quantized files of {model}, by which vLLM would "
            "take the student's weights for quantized ones; or give the student files that are not"
        )

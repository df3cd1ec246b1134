"""Describe how the processes and the rows of a step are divided."""

from __future__ import annotations

from megatron_gkd.config.schema import Recipe


def describe_layout(recipe: Recipe, world_size: int) -> dict[str, str]:
    """Return the processes of the layers and of the experts, and the rows of a step, as products by their names."""
    p, train = recipe.parallel, recipe.train
    replicas, expert_replicas = recipe.data_parallel_size(world_size), recipe.expert_data_parallel_size(world_size)
    pipeline, packed = p.pipeline_model_parallel_size, "; packing makes them fewer" if recipe.data.packing else ""
    return {
        "layout": (
            f"{world_size} processes = tensor {p.tensor_model_parallel_size} x context {p.context_parallel_size} "
            f"x pipeline {pipeline} x data {replicas}"
        ),
        "experts": (
            f"{world_size} processes = tensor {p.expert_tensor_parallel_size} x expert "
            f"{p.expert_model_parallel_size} x pipeline {pipeline} x data {expert_replicas}"
        ),
        "step": (
            f"{train.global_batch_size} rows = data {replicas} x microbatches {recipe.num_microbatches(world_size)} "
            f"x rows {train.micro_batch_size}{packed}"
        ),
    }

"""What the rollout engine holds on a GPU, and an estimate of how long it samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.cluster import Assumptions, Cluster, Rates
from megatron_gkd.planning.model_sizes import ModelSizes

EMBEDDED_PROMPT_TOKENS = 8192
"""The embedded engine's `max_prompt_tokens`."""

VALUE_BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class Sampling:
    """How the rows of an on-policy generation are sampled on one engine.

    Attributes:
        rows: sequences of one engine in a generation.
        at_once: how many of them decode at the same time.
        prompt: tokens of a prompt.
        completion: tokens of a completion.
    """

    rows: int
    at_once: int
    prompt: int
    completion: int

    @property
    def rounds(self) -> int:
        """How many times as long as one completion takes until all rows are sampled."""
        return -(-self.rows // self.at_once)


@dataclass(frozen=True)
class RolloutCosts:
    """The rollout engine of a run.

    Attributes:
        engine: rollout.engine.
        ranks: GPUs of one engine.
        weights: bytes of an engine's own weights on each GPU; 0 where it computes with the student's.
        kv_cache: bytes of its cache of keys and values on each GPU.
        kept_asleep: bytes that stay on each GPU while the engine does not sample.
        host: bytes of its weights in host memory for each GPU while it sleeps.
        logits: bytes of the logits that are sampled from, on the last stage.
        sampling: None where servers elsewhere sample.
        seconds: to sample all rows of a generation; None where servers elsewhere do.
    """

    engine: str
    ranks: int
    weights: int
    kv_cache: int
    kept_asleep: int
    host: int
    logits: int
    sampling: Sampling | None
    seconds: float | None


def plan_rollouts(recipe: Recipe, cluster: Cluster, sizes: ModelSizes, assumptions: Assumptions) -> RolloutCosts | None:
    """Return the costs of a generation that is sampled as a whole; None where distill.lmbda is 0."""
    if recipe.distill.lmbda == 0:
        return None
    match recipe.rollout.engine:
        case "vllm":
            return _colocated(recipe, cluster, sizes, assumptions)
        case "megatron":
            return _embedded(recipe, cluster, sizes, assumptions)
    return RolloutCosts("vllm_server", 0, 0, 0, 0, 0, 0, None, None)


def _generation_rows(recipe: Recipe) -> int:
    return recipe.train.global_batch_size * recipe.steps_per_generation


def _lengths(recipe: Recipe) -> tuple[int, int]:
    """Return the longest prompt and the longest completion beside it, in tokens."""
    return recipe.max_prompt_length, recipe.max_completion_length


def _colocated(recipe: Recipe, cluster: Cluster, sizes: ModelSizes, assumptions: Assumptions) -> RolloutCosts:
    section = recipe.rollout
    ranks = section.vllm_tensor_parallel_size
    merged = None if recipe.lora is None else recipe.lora.merge_dtype
    value = VALUE_BYTES[merged or recipe.train.dtype]
    weights = sizes.parameters * value // ranks
    budget = int(cluster.gpu_memory * section.vllm_gpu_memory_utilization)
    cache = max(0, budget - weights)
    if section.vllm_kv_cache_gib is not None:
        cache = int(section.vllm_kv_cache_gib * 2**30)
    per_token = sizes.kv_values * value / min(ranks, sizes.kv_heads)
    prompt, completion = _lengths(recipe)
    rows = -(-_generation_rows(recipe) * ranks // cluster.gpus)
    at_once = max(1, min(rows, int(cache / per_token) // (prompt + completion)))
    sampling = Sampling(rows, at_once, prompt, completion)
    rates = Rates.of(cluster.device, assumptions)
    read = sizes.parameters_read(at_once) * value / ranks + at_once * (prompt + completion / 2) * per_token
    step = max(read / rates.memory, 2 * sizes.active * at_once / ranks / rates.flops) + assumptions.vllm_step_s
    prefill = 2 * sizes.active * rows * prompt / ranks / rates.flops
    return RolloutCosts(
        engine="vllm",
        ranks=ranks,
        weights=weights,
        kv_cache=cache,
        kept_asleep=weights + cache if section.sleep_level == 0 else 0,
        host=weights if section.sleep_level == 1 else 0,
        logits=0,
        sampling=sampling,
        seconds=prefill + sampling.rounds * completion * step,
    )


def _embedded(recipe: Recipe, cluster: Cluster, sizes: ModelSizes, assumptions: Assumptions) -> RolloutCosts:
    p = recipe.parallel
    tp, pp, cp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size, p.context_parallel_size
    value = VALUE_BYTES[recipe.train.dtype]
    prompt, completion = _lengths(recipe)
    # Context-parallel ranks share the rows of a replica.
    rows = -(-_generation_rows(recipe) // (recipe.data_parallel_size(cluster.gpus) * cp))
    at_once = max(1, min(rows, recipe.rollout.max_batch_tokens // (prompt + completion - 1)))
    sampling = Sampling(rows, at_once, prompt, completion)
    per_token = sizes.kv_values * value / pp / min(tp, sizes.kv_heads)
    cache = int(at_once * (prompt + completion - 1) * per_token)
    rates = Rates.of(cluster.device, assumptions)
    # A step is one forward pass of each of `pp` batches through all stages.
    batch = math.ceil(at_once / pp)
    experts = p.expert_model_parallel_size * p.expert_tensor_parallel_size if sizes.num_experts else 1
    dense_read = (sizes.parameters - sizes.embedding - sizes.experts) * value / (tp * pp)
    expert_read = (sizes.parameters_read(batch * experts) - sizes.parameters_read(0)) * value / (experts * pp)
    kv_read = batch * (prompt + completion / 2) * per_token
    stage = (dense_read + expert_read + kv_read) / rates.memory + sizes.layers / pp * assumptions.embedded_layer_s
    prefill = 2 * sizes.active * rows * prompt / (tp * pp) / rates.flops
    return RolloutCosts(
        engine="megatron",
        ranks=tp * pp,
        weights=0,
        kv_cache=cache,
        kept_asleep=0,
        host=0,
        logits=at_once * (sizes.vocab_size // tp) * (value + 4),
        sampling=sampling,
        seconds=prefill + sampling.rounds * completion * (2 * pp - 1) * stage,
    )

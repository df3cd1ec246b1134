"""What does not fit into memory, by how much, and which keys of the recipe change that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.memory import MemoryPhase, Part, PhaseMemory, RankMemory
from megatron_gkd.planning.settings import Settings, apply_settings, are_valid, as_sections


@dataclass(frozen=True)
class Remedy:
    """Other values of keys that make a phase smaller.

    Attributes:
        settings: the values by leaf.
        reason: what they change.
    """

    settings: Settings
    reason: str

    def __str__(self) -> str:
        named = [
            f"{section}.{leaf} = {str(value).lower() if isinstance(value, bool) else value}"
            for section, leaves in as_sections(self.settings).items()
            for leaf, value in leaves.items()
        ]
        return f"{', '.join(named)}: {self.reason}"


@dataclass(frozen=True)
class Shortfall:
    """A phase that needs more than a GPU has.

    Attributes:
        phase: the part of the step.
        stage: the pipeline stage that needs most.
        needed: bytes of the phase on that stage.
        over: bytes beyond the GPU's memory.
        part: the largest part.
        part_bytes: its bytes.
        remedies: what makes the phase smaller, for the largest parts first; each passes the recipe's checks alone.
    """

    phase: MemoryPhase
    stage: int
    needed: int
    over: int
    part: Part
    part_bytes: int
    remedies: tuple[Remedy, ...]


def find_shortfalls(ranks: Sequence[RankMemory], gpu_memory: int, recipe: Recipe, world_size: int) -> list[Shortfall]:
    """Return the phases that need more than a GPU has, each on the stage where it needs most."""
    found = []
    for phase in dict.fromkeys(one.phase for rank in ranks for one in rank.phases):
        candidates = [(rank.stage, one) for rank in ranks for one in rank.phases if one.phase == phase]
        stage, worst = max(candidates, key=lambda pair: pair[1].total)
        if worst.total > gpu_memory:
            part = max((one for one in worst.parts if one != "reserve"), key=lambda one: worst.parts[one])
            found.append(
                Shortfall(
                    phase=worst.phase,
                    stage=stage,
                    needed=worst.total,
                    over=worst.total - gpu_memory,
                    part=part,
                    part_bytes=worst.parts[part],
                    remedies=tuple(_valid_remedies(worst, worst.total - gpu_memory, recipe, world_size)),
                )
            )
    return found


def _valid_remedies(worst: PhaseMemory, over: int, recipe: Recipe, world_size: int) -> Iterator[Remedy]:
    """Yield remedies that the recipe's checks allow, those of the largest part first."""
    seen: list[Settings] = []
    for part in sorted(worst.parts, key=lambda one: -worst.parts[one]):
        if worst.parts[part] * 4 < over or part not in _REMEDIES:  # smaller parts change little
            continue
        for remedy in _REMEDIES[part](worst.phase, recipe):
            if remedy.settings not in seen and are_valid(apply_settings(recipe, remedy.settings), world_size):
                seen.append(remedy.settings)
                yield remedy


def _teacher_weights(phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    resident = [one for one in recipe.teacher.all.values() if one.source == "local" and not one.offload_teacher_model]
    if phase != "teacher" and resident:
        yield Remedy({"offload_teacher_model": True}, "the teacher is in host memory while it does not score")
    if phase == "teacher" or not resident:
        yield from _more_ranks(recipe, "the teacher's weights")


def _student_weights(phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    if phase == "rollout" and recipe.rollout.engine == "vllm" and not recipe.memory.offload_model:
        yield Remedy({"offload_model": True}, "weights and gradients are in host memory while vLLM samples")
    yield from _more_ranks(recipe, "the student's weights and gradients")


def _more_ranks(recipe: Recipe, what: str) -> Iterator[Remedy]:
    p = recipe.parallel
    ep, tp, pp = p.expert_model_parallel_size, p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    yield Remedy({"expert_model_parallel_size": 2 * ep}, "more ranks share the experts")
    yield Remedy({"tensor_model_parallel_size": 2 * tp, "sequence_parallel": True}, f"more ranks share {what}")
    yield Remedy({"pipeline_model_parallel_size": 2 * pp}, f"more ranks share {what}")


def _optimizer(phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    memory = recipe.memory
    if not recipe.parallel.distributed_optimizer:
        yield Remedy({"distributed_optimizer": True}, "data-parallel ranks share the optimizer's state")
    if phase == "rollout" and not memory.offload_optimizer:
        yield Remedy({"offload_optimizer": True}, "the optimizer's state is in host memory while the student samples")
    if not memory.optimizer_cpu_offload:
        yield Remedy({"optimizer_cpu_offload": True}, "the optimizer's state is in host memory; updates take longer")
    yield from _more_ranks(recipe, "the optimizer's state")


def _activations(phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    p, rows = recipe.parallel, recipe.train.micro_batch_size
    if p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        yield Remedy({"sequence_parallel": True}, "tensor-parallel ranks share activations")
    if phase == "student" and p.recompute_granularity != "full":
        yield Remedy(RECOMPUTE_LAYERS, "activations are computed again in the backward pass")
    if rows > 1:
        yield Remedy({"micro_batch_size": rows // 2}, "fewer tokens in one pass")
    if phase == "teacher" and recipe.teacher.teacher_micro_batch_tokens is None and rows > 1:
        yield Remedy({"teacher_micro_batch_tokens": recipe.data.max_length}, "the teacher reads fewer tokens in a pass")
    yield Remedy({"context_parallel_size": 2 * p.context_parallel_size}, "more ranks share each sequence")


RECOMPUTE_LAYERS: Settings = {
    "recompute_granularity": "full",
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
}
"""Compute each layer's activations again in the backward pass."""


def _teacher_states(_phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    if any(one.teacher_states == "device" for one in recipe.teacher.all.values()):
        yield Remedy({"teacher_states": "host"}, "the teacher's hidden states wait in host memory")


def _loss(_phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    chunk = recipe.distill.loss_chunk_tokens
    if chunk is None or chunk > 128:  # by default they are more than 512, unless the vocabulary is very large
        yield Remedy({"loss_chunk_tokens": 512 if chunk is None else chunk // 2}, "fewer rows of logits at once")


def _engine(phase: MemoryPhase, recipe: Recipe) -> Iterator[Remedy]:
    section = recipe.rollout
    if section.engine != "vllm":
        yield from _activations(phase, recipe)
        return
    if phase not in ("rollout", "weight_sync") and section.sleep_level == 0:
        yield Remedy({"sleep_level": 2}, "vLLM frees its memory while it does not sample")
    if phase == "rollout" and section.vllm_kv_cache_gib is None:
        less = round(section.vllm_gpu_memory_utilization * 0.75, 2)
        yield Remedy({"vllm_gpu_memory_utilization": less}, "vLLM has a smaller cache of keys and values")
    elif phase == "rollout":
        less = (section.vllm_kv_cache_gib or 0) / 2
        yield Remedy({"vllm_kv_cache_gib": less}, "vLLM has a smaller cache of keys and values")
    ranks = 2 * section.vllm_tensor_parallel_size
    yield Remedy({"vllm_tensor_parallel_size": ranks}, "more ranks share vLLM's weights")


_REMEDIES: dict[Part, Callable[[MemoryPhase, Recipe], Iterator[Remedy]]] = {
    "teacher_weights": _teacher_weights,
    "student_weights": _student_weights,
    "student_gradients": _student_weights,
    "optimizer": _optimizer,
    "activations": _activations,
    "transient": _activations,
    "teacher_states": _teacher_states,
    "loss": _loss,
    "rollout_weights": _engine,
    "kv_cache": _engine,
}

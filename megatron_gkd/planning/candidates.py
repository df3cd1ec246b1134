"""Layouts that a recipe's checks allow and whose weights can fit, from the one with the smallest time bound."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.cluster import Assumptions, Cluster, Rates
from megatron_gkd.planning.model_sizes import ModelSizes
from megatron_gkd.planning.rollout import VALUE_BYTES
from megatron_gkd.planning.settings import Settings, apply_settings, are_valid

_SHORTEST_SHARE = 2048
"""Tokens of a sequence that context parallelism leaves to a rank at least: less costs more than it saves."""


@dataclass(frozen=True)
class Layout:
    """The sizes of the parallel dimensions."""

    tp: int
    pp: int
    cp: int
    ep: int
    etp: int

    def settings(self) -> dict[str, Any]:
        """Return the recipe's keys, with those that another layout would leave over."""
        return {
            "tensor_model_parallel_size": self.tp,
            "pipeline_model_parallel_size": self.pp,
            "virtual_pipeline_model_parallel_size": None,
            "context_parallel_size": self.cp,
            "expert_model_parallel_size": self.ep,
            "expert_tensor_parallel_size": self.etp,
            "sequence_parallel": self.tp > 1,
            "decoder_first_pipeline_num_layers": None,
            "decoder_last_pipeline_num_layers": None,
            "pipeline_model_parallel_layout": None,
            "recompute_granularity": None,
            "recompute_method": None,
            "recompute_num_layers": None,
            "recompute_modules": (),
            "micro_batch_size": 1,
        }


@dataclass(frozen=True)
class Candidate:
    """A layout that may be measured.

    Attributes:
        bound: a rough time of a step, in seconds.
        settings: all keys of the recipe that make the layout.
    """

    bound: float
    settings: Settings


@dataclass(frozen=True)
class LayoutSearch:
    """Finds layouts before anything is measured.

    Attributes:
        recipe: the recipe whose layout is varied.
        cluster: the GPUs.
        assumptions: what they reach.
        student: sizes of the student.
        teachers: sizes of the local teachers.
    """

    recipe: Recipe
    cluster: Cluster
    assumptions: Assumptions
    student: ModelSizes
    teachers: tuple[ModelSizes, ...]

    def candidates(self) -> list[Candidate]:
        """Return all layouts that are allowed, in the order of their bounds."""
        found = [one for one in self._layouts() if self.weights(one) <= self.cluster.gpu_memory]
        found.sort(key=lambda one: (self.bound(one), one.tp, one.pp, one.cp, one.ep))
        made = [Candidate(self.bound(one), one.settings() | self._of_teachers()) for one in found]
        return [one for one in made if are_valid(apply_settings(self.recipe, one.settings), self.cluster.gpus)]

    def _of_teachers(self) -> dict[str, Any]:
        if not self.teachers:
            return {}
        return {
            "offload_teacher_model": True,
            "teacher_decoder_first_pipeline_num_layers": None,
            "teacher_decoder_last_pipeline_num_layers": None,
            "teacher_pipeline_model_parallel_layout": None,
        }

    def _layouts(self) -> Iterator[Layout]:
        gpus, node = self.cluster.gpus, min(self.cluster.gpus_per_node, self.cluster.gpus)
        models = (self.student, *self.teachers)
        longest = self.recipe.data.max_length
        experts = [one.num_experts for one in models if one.num_experts]
        for tp, pp, cp in itertools.product(_divisors(node), _divisors(gpus), _powers_of_two(gpus)):
            if gpus % (tp * pp * cp) or any(one.layers % pp for one in models):
                continue
            if cp > 1 and longest // cp < _SHORTEST_SHARE:
                continue
            for ep, etp in itertools.product(_common_divisors(experts), {1, tp} if experts else {1}):
                if gpus % (ep * etp * pp) == 0 and self.recipe.train.global_batch_size % (gpus // (tp * pp * cp)) == 0:
                    yield Layout(tp, pp, cp, ep, etp)

    def weights(self, layout: Layout) -> float:
        """Return the bytes that a rank holds at least while a teacher scores or the student trains."""
        value, recipe = VALUE_BYTES[self.recipe.train.dtype], self.recipe
        dense, experts = _shares(self.student, layout)
        held = (dense + experts) * value
        if recipe.lora is None and not recipe.train.freeze_llm:
            held += (dense + experts) * 2  # gradients in bf16 at least
            if recipe.parallel.distributed_optimizer and not recipe.memory.optimizer_cpu_offload:
                gpus = self.cluster.gpus
                replicas, expert_replicas = (
                    gpus // (layout.tp * layout.pp),
                    gpus // (layout.ep * layout.etp * layout.pp),
                )
                held += (dense / replicas + experts / expert_replicas) * 4
        teacher = max((sum(_shares(one, layout)) for one in self.teachers), default=0.0) * value
        return held + teacher + self.assumptions.reserve

    def bound(self, layout: Layout) -> float:
        """Return a rough time of a step in seconds, by which layouts are measured first or not at all."""
        rates = Rates.of(self.cluster.device, self.assumptions)
        recipe, gpus = self.recipe, self.cluster.gpus
        replicas = gpus // (layout.tp * layout.pp * layout.cp)
        microbatches = recipe.train.global_batch_size // replicas
        local = recipe.data.max_length / layout.cp
        seconds = 0.0
        for model, passes in ((self.student, 3), *((one, 1) for one in self.teachers)):
            tokens = recipe.train.global_batch_size * recipe.data.max_length
            compute = 2 * passes * model.active * tokens / gpus / rates.flops
            layers = model.layers / layout.pp * microbatches * passes
            message = local * model.hidden_size * VALUE_BYTES[recipe.train.dtype]
            shared = 4 * message * layers * (layout.tp - 1) / layout.tp / rates.nvlink
            if layout.tp > model.kv_heads:  # Megatron gathers queries, keys and values of all ranks
                shared *= 1.5
            sent = 2 * message / layout.tp * model.experts_per_token * layers * (layout.ep - 1) / layout.ep
            is_near = layout.ep * layout.etp <= self.cluster.gpus_per_node
            exchanged = sent / (rates.nvlink if is_near else rates.network)
            seconds += (compute + shared + exchanged) * (1 + (layout.pp - 1) / microbatches)
        dense, experts = _shares(self.student, layout)
        seconds += 6 * (dense + experts) / rates.network * (gpus > self.cluster.gpus_per_node)
        return seconds * (1 + 0.02 * (layout.cp - 1))


def _shares(model: ModelSizes, layout: Layout) -> tuple[float, float]:
    """Return a rank's parameters beside the experts, and its experts'."""
    dense = (model.parameters - model.experts) / (layout.tp * layout.pp)
    return dense, model.experts / (layout.ep * layout.etp * layout.pp)


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _powers_of_two(limit: int) -> list[int]:
    return [2**power for power in range(limit.bit_length()) if 2**power <= limit]


def _common_divisors(numbers: Sequence[int]) -> list[int]:
    """Return what divides all numbers; 1 alone where there are none."""
    if not numbers:
        return [1]
    return [one for one in _divisors(min(numbers)) if all(number % one == 0 for number in numbers)]

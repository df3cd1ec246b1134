"""The memory of a rank by part, in each phase of a step, and of a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.cluster import Assumptions, Cluster
from megatron_gkd.planning.costs import ForwardCosts, RankCosts
from megatron_gkd.planning.model_sizes import ModelSizes
from megatron_gkd.planning.rollout import EMBEDDED_PROMPT_TOKENS, VALUE_BYTES, RolloutCosts

MemoryPhase = Literal["rollout", "teacher", "student", "update", "weight_sync", "export"]
Part = Literal[
    "student_weights",
    "student_gradients",
    "optimizer",
    "teacher_weights",
    "teacher_states",
    "activations",
    "transient",
    "loss",
    "update",
    "rollout_weights",
    "kv_cache",
    "gathered_weights",
    "reserve",
]
Parts = Mapping[Part, int]


@dataclass(frozen=True)
class PhaseMemory:
    """The most memory of a rank in one phase of a step.

    Attributes:
        phase: the part of the step.
        parts: bytes by part; parts of 0 bytes are left out.
    """

    phase: MemoryPhase
    parts: Parts

    @property
    def total(self) -> int:
        """All parts together, in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank, which stands for all of its pipeline stage.

    Attributes:
        rank: of the world.
        stage: its pipeline stage.
        phases: in the order of a step.
    """

    rank: int
    stage: int
    phases: tuple[PhaseMemory, ...]

    @property
    def peak(self) -> PhaseMemory:
        """The phase that needs most."""
        return max(self.phases, key=lambda one: one.total)


@dataclass(frozen=True)
class MemoryModel:
    """Adds up what ranks hold in each phase.

    Attributes:
        recipe: of the run.
        cluster: its GPUs.
        sizes: of the student.
        assumptions: the reserve.
        rollouts: the rollout engine; None where the student does not sample.
    """

    recipe: Recipe
    cluster: Cluster
    sizes: ModelSizes
    assumptions: Assumptions
    rollouts: RolloutCosts | None

    def of_rank(self, costs: RankCosts) -> RankMemory:
        """Return the memory of one rank."""
        phases = tuple(
            PhaseMemory(phase, {part: size for part, size in parts.items() if size > 0})
            for phase, parts in self._phases(costs)
        )
        return RankMemory(costs.rank, costs.stage, phases)

    def of_nodes(self, ranks: Sequence[RankCosts]) -> dict[str, int]:
        """Return bytes of host memory by part, on the node that needs most."""
        per_rank = [self._host(costs) for costs in ranks]
        largest = max(per_rank, key=lambda parts: sum(parts.values()))
        count = min(self.cluster.gpus, self.cluster.gpus_per_node)
        return {part: size * count for part, size in largest.items() if size}

    def _phases(self, costs: RankCosts) -> Iterator[tuple[MemoryPhase, dict[Part, int]]]:
        student = self._student(costs)
        states = self._states(costs)
        if self.rollouts is not None and self.rollouts.engine != "vllm_server":
            yield "rollout", self._rollout(costs)
        for name, teacher in costs.teachers.items():
            others = sum(one.weights_resident for place, one in costs.teachers.items() if place != name)
            parts: dict[Part, int] = student | {"teacher_weights": teacher.weights + others, "teacher_states": states}
            yield "teacher", parts | _activations(teacher.forward)
        student["teacher_weights"] = sum(one.weights_resident for one in costs.teachers.values())
        yield "student", student | {"teacher_states": states} | _activations(costs.student.forward)
        yield "update", student | {"update": costs.student.update}
        gathered: dict[Part, int] = {"gathered_weights": self._gathered()}
        if self.rollouts is not None and self.rollouts.engine != "megatron":
            yield "weight_sync", student | {"rollout_weights": self._engine_weights()} | gathered
        yield "export", student | gathered

    def _student(self, costs: RankCosts) -> dict[Part, int]:
        """Return what stays on the device from step to step, without the teachers."""
        model = costs.student
        asleep = 0 if self.rollouts is None else self.rollouts.kept_asleep
        weights = min(asleep, 0 if self.rollouts is None else self.rollouts.weights)
        return {
            "student_weights": model.weights,
            "student_gradients": model.gradients,
            "optimizer": model.optimizer,
            "rollout_weights": weights,
            "kv_cache": asleep - weights,
            "reserve": self.assumptions.reserve,
        }

    def _engine_weights(self) -> int:
        return 0 if self.rollouts is None else self.rollouts.weights

    def _states(self, costs: RankCosts) -> int:
        """Return the bytes of teachers' states on the device: all, or those of two microbatches."""
        if all(one.teacher_states == "device" for one in self.recipe.teacher.all.values()):
            return costs.teacher_states
        return min(costs.teacher_states, 2 * costs.teacher_states // max(1, costs.student.forward.microbatches))

    def _rollout(self, costs: RankCosts) -> dict[Part, int]:
        rollouts, memory = self.rollouts, self.recipe.memory
        if rollouts is None:
            return {}
        parts = self._student(costs)
        parts["teacher_weights"] = sum(one.weights_resident for one in costs.teachers.values())
        parts |= {"rollout_weights": rollouts.weights, "kv_cache": rollouts.kv_cache}
        if memory.offload_model or memory.offload_optimizer:
            parts["student_gradients"] = 0
        if memory.offload_model:
            parts["student_weights"] = 0
        if memory.offload_optimizer:
            parts["optimizer"] = 0
        if rollouts.engine == "megatron":
            forward = costs.student.forward
            prompts = EMBEDDED_PROMPT_TOKENS / max(1, forward.microbatch_tokens)
            parts["transient"] = int(forward.transient * max(1.0, prompts)) + (rollouts.logits if forward.loss else 0)
        return parts

    def _gathered(self) -> int:
        """Return the bytes of the largest tensor that is made whole on a rank, and of the parts that it is made of."""
        share = self.sizes.largest_experts // self.recipe.parallel.expert_model_parallel_size
        return 2 * max(self.sizes.largest_tensor, share) * VALUE_BYTES[self.recipe.train.dtype]

    def _host(self, costs: RankCosts) -> dict[str, int]:
        memory, model = self.recipe.memory, costs.student
        leaves = self.rollouts is not None and self.rollouts.engine != "vllm_server"
        states = sum(one.teacher_states == "host" for one in self.recipe.teacher.all.values())
        return {
            "teacher_weights": sum(one.weights_host for one in costs.teachers.values()),
            "teacher_states": costs.teacher_states if states else 0,
            "optimizer": model.optimizer_host + (model.optimizer if leaves and memory.offload_optimizer else 0),
            "student_weights": model.weights_host + (model.weights if leaves and memory.offload_model else 0),
            "rollout_weights": 0 if self.rollouts is None else self.rollouts.host,
        }


def _activations(forward: ForwardCosts) -> dict[Part, int]:
    """Return the peak of the activations, as what is kept for the backward pass and what is not.

    What is not kept counts as the loss's where the loss needs more than the layers.
    """
    kept = min(forward.peak, int(forward.kept * forward.in_flight))
    rest = forward.peak - kept
    loss = min(rest, forward.loss) if forward.loss >= forward.transient else 0
    return {"activations": kept, "loss": loss, "transient": rest - loss}

"""A plan: memory, communication and time of a recipe's step on a cluster, from the costs of its ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.cluster import Assumptions, Cluster
from megatron_gkd.planning.costs import RankCosts
from megatron_gkd.planning.memory import MemoryModel, RankMemory
from megatron_gkd.planning.model_sizes import ModelSizes
from megatron_gkd.planning.placement import Placement
from megatron_gkd.planning.rollout import RolloutCosts, plan_rollouts
from megatron_gkd.planning.shortfalls import Shortfall, find_shortfalls
from megatron_gkd.planning.timing import StepTime, TimeModel
from megatron_gkd.planning.traffic import LinkTraffic

NOT_COUNTED = (
    "No figure here was compared with a GPU. Memory is that of tensors; CUDA's context, buffers of NCCL, workspaces of "
    "libraries and fragmentation are in the reserve, which is an assumption.",
    "Times are estimates from the figures of the device's data sheet and the assumed shares of them.",
    "Communication of tensor, context and expert parallelism is counted as if nothing ran beside it.",
    "Reading data, checkpoints, exports, validation and waiting for a slower rank take no time here.",
)


@dataclass(frozen=True)
class Plan:
    """What a recipe needs on a cluster.

    Attributes:
        recipe: the recipe.
        cluster: its GPUs.
        assumptions: what is not measured.
        costs: of one rank of each pipeline stage.
        memory: of the same ranks.
        host: bytes of a node's memory by part.
        links: communication of each of these ranks in a step.
        rollouts: the rollout engine; None where the student does not sample.
        time: of a step.
        shortfalls: what does not fit; empty if all does.
    """

    recipe: Recipe
    cluster: Cluster
    assumptions: Assumptions
    costs: tuple[RankCosts, ...]
    memory: tuple[RankMemory, ...]
    host: dict[str, int]
    links: tuple[tuple[LinkTraffic, ...], ...]
    rollouts: RolloutCosts | None
    time: StepTime
    shortfalls: tuple[Shortfall, ...]

    @property
    def fits(self) -> bool:
        """Whether every phase fits into the GPUs' memory."""
        return not self.shortfalls

    @property
    def peak(self) -> int:
        """Bytes of the phase and stage that need most."""
        return max(one.peak.total for one in self.memory)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not counted, in whole sentences."""
        measured = [note for costs in self.costs for note in costs.notes]
        return tuple(dict.fromkeys((*NOT_COUNTED, *self._rollout_notes(), *measured)))

    def _rollout_notes(self) -> list[str]:
        if self.rollouts is None:
            return []
        if self.rollouts.engine == "vllm_server":
            return [
                "Sampling on vLLM servers takes no time and no memory here; weights are gathered, not sent to them."
            ]
        return [
            "Sampling is an estimate of decoding alone: each token reads weights and cache once, every prompt and "
            "completion has its longest length, and a GPU's engine decodes its rows in rounds."
        ]


def make_plan(
    recipe: Recipe, cluster: Cluster, assumptions: Assumptions, costs: Sequence[RankCosts], sizes: ModelSizes
) -> Plan:
    """Return the plan of a recipe.

    Args:
        recipe: the recipe, which passes its checks for the cluster's GPUs.
        cluster: the GPUs.
        assumptions: what is not measured.
        costs: of one rank of each pipeline stage.
        sizes: of the student.
    """
    rollouts = plan_rollouts(recipe, cluster, sizes, assumptions)
    placement = Placement.of(recipe.parallel, cluster.gpus, cluster.gpus_per_node)
    memory_model = MemoryModel(recipe, cluster, sizes, assumptions, rollouts)
    time_model = TimeModel(recipe, cluster, placement, sizes, assumptions, rollouts)
    memory = tuple(memory_model.of_rank(one) for one in costs)
    return Plan(
        recipe=recipe,
        cluster=cluster,
        assumptions=assumptions,
        costs=tuple(costs),
        memory=memory,
        host=memory_model.of_nodes(costs),
        links=tuple(tuple(time_model.links(one)) for one in costs),
        rollouts=rollouts,
        time=time_model.estimate(costs),
        shortfalls=tuple(find_shortfalls(memory, cluster.gpu_memory, recipe, cluster.gpus)),
    )

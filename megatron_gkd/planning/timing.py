"""An estimate of a step's time from FLOPs, bytes and the figures of a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.cluster import Assumptions, Cluster, Rates
from megatron_gkd.planning.costs import ModelCosts, RankCosts, Traffic
from megatron_gkd.planning.model_sizes import ModelSizes
from megatron_gkd.planning.placement import Placement
from megatron_gkd.planning.rollout import VALUE_BYTES, RolloutCosts
from megatron_gkd.planning.traffic import LinkTraffic, sum_links, sync_weights

_REPLICAS = ("dp", "expert_dp")


@dataclass(frozen=True)
class PhaseTime:
    """The estimated time of a phase of a step, in seconds, on the stage that needs most.

    Attributes:
        phase: the part of the step.
        compute: of matrix products, or of reads and writes of the GPU's memory.
        communication: that nothing else hides.
        bubble: waiting for the first and the last microbatch of a pipeline.
        transfers: between the GPU and the node's memory.
    """

    phase: str
    compute: float
    communication: float = 0.0
    bubble: float = 0.0
    transfers: float = 0.0

    @property
    def total(self) -> float:
        """All together, in seconds."""
        return self.compute + self.communication + self.bubble + self.transfers


@dataclass(frozen=True)
class StepTime:
    """The estimated time of a step.

    Attributes:
        phases: of a step before which the student samples a generation, in their order.
        lmbda: share of such steps or rows.
        tokens: of a step, with padding, prompts included.
        flops: of a step over all GPUs, with what is recomputed.
        peak_flops: FLOP/s of all GPUs together, as the data sheet has them.
        steps_per_generation: steps that train on what is sampled once.
    """

    phases: tuple[PhaseTime, ...]
    lmbda: float
    tokens: int
    flops: float
    peak_flops: float
    steps_per_generation: int = 1

    @property
    def rollout(self) -> float:
        """Seconds that sampling adds to the first step of a generation."""
        return sum(one.total for one in self.phases if one.phase in ("rollout", "weight_sync"))

    @property
    def without_rollout(self) -> float:
        """Seconds of a step on rows of the data set."""
        return sum(one.total for one in self.phases) - self.rollout

    @property
    def mean(self) -> float:
        """Seconds of a step, in the mean over on-policy and other ones."""
        return self.without_rollout + self.lmbda * self.rollout / self.steps_per_generation

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are trained on or read as prompts, a second."""
        return self.tokens / self.mean

    @property
    def flops_utilization(self) -> float:
        """Share of the data sheet's FLOP/s over the whole step."""
        return self.flops / (self.peak_flops * self.mean)


@dataclass(frozen=True)
class TimeModel:
    """Estimates the time of a step.

    Attributes:
        recipe: of the run.
        cluster: its GPUs.
        placement: of its ranks.
        sizes: of the student.
        assumptions: what is assumed.
        rollouts: the rollout engine; None where the student does not sample.
    """

    recipe: Recipe
    cluster: Cluster
    placement: Placement
    sizes: ModelSizes
    assumptions: Assumptions
    rollouts: RolloutCosts | None

    @property
    def rates(self) -> Rates:
        """What a GPU reaches."""
        return Rates.of(self.cluster.device, self.assumptions)

    def links(self, costs: RankCosts) -> list[LinkTraffic]:
        """Return the communication of one rank in a step that the student samples."""
        links = sum_links(costs.traffic, costs.rank, self.placement, self.rates)
        return links + [one for one in [self._sync(costs)] if one is not None]

    def estimate(self, ranks: Sequence[RankCosts]) -> StepTime:
        """Return the time of a step, from the costs of one rank of each pipeline stage."""
        phases: list[PhaseTime] = []
        if self.rollouts is not None:
            phases += self._rollout_phases(ranks, self.rollouts)
        if any(costs.teachers for costs in ranks):
            phases.append(max((self._teacher(costs) for costs in ranks), key=lambda one: one.total))
        student = max((self._student(costs) for costs in ranks), key=lambda one: one.total)
        phases += [student, max((self._update(costs, student) for costs in ranks), key=lambda one: one.total)]
        forward = ranks[0].student.forward
        replicas = self.placement.sizes["dp"]
        return StepTime(
            phases=tuple(phases),
            lmbda=self.recipe.distill.lmbda,
            tokens=forward.microbatches * forward.microbatch_tokens * replicas,
            flops=sum(costs.num_ranks * _flops(costs) for costs in ranks),
            peak_flops=self.cluster.gpus * self.cluster.device.bf16_tflops * 1e12,
            steps_per_generation=self.recipe.steps_per_generation,
        )

    def _rollout_phases(self, ranks: Sequence[RankCosts], rollouts: RolloutCosts) -> list[PhaseTime]:
        memory, host = self.recipe.memory, self.rates.host
        moved = 0
        if rollouts.engine != "vllm_server":
            moved = max(
                2 * (one.student.weights * memory.offload_model + one.student.optimizer * memory.offload_optimizer)
                for one in ranks
            )
        synced = [one.seconds for one in map(self._sync, ranks) if one is not None]
        phases = [PhaseTime("weight_sync", 0.0, max(synced, default=0.0))]
        if rollouts.seconds is not None:
            phases.append(PhaseTime("rollout", rollouts.seconds, transfers=moved / host))
        return phases

    def _sync(self, costs: RankCosts) -> LinkTraffic | None:
        """Return what gathers the weights for an engine that has its own, where it was not measured."""
        is_measured = any(one.phase == "weight_sync" for one in costs.traffic)
        if self.rollouts is None or self.rollouts.engine == "megatron" or is_measured:
            return None
        num_bytes = self.sizes.parameters * VALUE_BYTES[self.recipe.train.dtype]
        return sync_weights(num_bytes, costs.rank, self.placement, self.rates)

    def _teacher(self, costs: RankCosts) -> PhaseTime:
        compute = sum(_times(one, is_teacher=True) for one in costs.teachers.values()) / self.rates.flops
        microbatches = max(one.forward.microbatches for one in costs.teachers.values())
        moved = sum(one.weights - one.weights_resident for one in costs.teachers.values())
        return self._pipelined(costs, "teacher", (compute, moved / self.rates.host), microbatches)

    def _student(self, costs: RankCosts) -> PhaseTime:
        compute = _times(costs.student) / self.rates.flops
        return self._pipelined(costs, "student", (compute, 0.0), costs.student.forward.microbatches)

    def _pipelined(self, costs: RankCosts, phase: str, seconds: tuple[float, float], microbatches: int) -> PhaseTime:
        """Return the time of a pipeline's schedule; `seconds` of computing and of transfers."""
        compute, transfers = seconds
        own = [one for one in costs.traffic if one.phase == phase and one.link not in _REPLICAS]
        communication = self._seconds(own, costs.rank)
        parallel = self.recipe.parallel
        chunks = (parallel.virtual_pipeline_model_parallel_size or 1) if phase == "student" else 1
        waits = (parallel.pipeline_model_parallel_size - 1) / chunks
        bubble = (compute + communication) / max(1, microbatches) * waits
        return PhaseTime(phase, compute, communication, bubble, transfers)

    def _update(self, costs: RankCosts, student: PhaseTime) -> PhaseTime:
        model, parallel = costs.student, self.recipe.parallel
        between = [one for one in costs.traffic if one.link in _REPLICAS or one.phase == "update"]
        gathers = [one for one in between if one.operation == "all_gather"]
        others = [one for one in between if one.operation != "all_gather"]
        # Overlapped communication runs beside forward and backward passes, and shows where it takes longer.
        hidden = student.compute + student.bubble
        shown = 0.0
        for same, is_hidden in ((gathers, parallel.overlap_param_gather), (others, parallel.overlap_grad_reduce)):
            needed = self._seconds(same, costs.rank)
            shown += max(0.0, needed - hidden) if is_hidden else needed
            hidden = max(0.0, hidden - needed) if is_hidden else hidden
        touched = 2 * model.optimizer + 2 * model.gradients + model.weights
        # For 12 bytes of state, which is read and written, 4 of gradients go to the host and 2 of weights come back.
        on_host = 2.5 * model.optimizer_host
        return PhaseTime("update", touched / self.rates.memory, shown, transfers=on_host / self.rates.host)

    def _seconds(self, traffic: Sequence[Traffic], rank: int) -> float:
        return sum(one.seconds for one in sum_links(traffic, rank, self.placement, self.rates))


def _times(model: ModelCosts, *, is_teacher: bool = False) -> float:
    """Return the FLOPs of all microbatches of a model on one rank."""
    forward = model.forward
    once = forward.forward_flops if is_teacher else forward.forward_flops + forward.backward_flops + forward.loss_flops
    return forward.microbatches * once


def _flops(costs: RankCosts) -> float:
    return _times(costs.student) + sum(_times(one, is_teacher=True) for one in costs.teachers.values())

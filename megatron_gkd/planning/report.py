"""The tables of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_gkd.config.layout import describe_layout
from megatron_gkd.planning.cluster import GIB
from megatron_gkd.planning.memory import MemoryPhase, Part, PhaseMemory, RankMemory
from megatron_gkd.planning.plan import Plan
from megatron_gkd.planning.shortfalls import Shortfall
from megatron_gkd.planning.tables import Block, Lines, Paragraph, Table
from megatron_gkd.reporting.numbers import format_count, format_seconds

PART_NAMES: dict[Part, str] = {
    "student_weights": "student weights",
    "student_gradients": "gradients",
    "optimizer": "optimizer state",
    "teacher_weights": "teacher weights",
    "teacher_states": "teacher's states",
    "activations": "activations kept",
    "transient": "activations, others",
    "loss": "loss",
    "update": "update",
    "rollout_weights": "rollout engine's weights",
    "kv_cache": "keys and values",
    "gathered_weights": "gathered weights",
    "reserve": "reserve (assumed)",
}
PHASE_NAMES = {"weight_sync": "weight sync"}
_LINKS = {"expert_dp": "expert DP", "model": "model (TP, PP, EP)"}


def blocks_of(plan: Plan) -> list[Block]:
    """Return all that is printed of a plan."""
    return [
        Lines("", tuple(_head(plan))),
        memory_table(plan),
        *([stages_table(plan)] if len(plan.memory) > 1 else []),
        *([host_table(plan)] if plan.host else []),
        links_table(plan),
        time_table(plan),
        Lines("Step (estimate)", tuple(step_lines(plan))),
        Paragraph("", tuple(verdict(plan))),
        Paragraph("Not counted", plan.notes),
    ]


def _head(plan: Plan) -> Iterator[tuple[str, str]]:
    cluster, assumed = plan.cluster, plan.assumptions
    yield "plan", f"{cluster.gpus} GPUs, {cluster.gpus_per_node} to a node; estimates, not compared with GPUs"
    yield "device", f"{cluster.device.name}, {gib(cluster.gpu_memory)} GiB"
    yield from describe_layout(plan.recipe, cluster.gpus).items()
    yield (
        "assumed",
        f"{gib(assumed.reserve)} GiB reserve a GPU, {assumed.mfu:g} of the peak FLOP/s in matrix products, "
        f"{assumed.bandwidth_efficiency:g} of each bandwidth",
    )


def gib(num_bytes: float) -> str:
    """Return bytes in GiB, with two decimals below 10 and one from there."""
    value = num_bytes / GIB
    return f"{value:.2f}" if abs(value) < 9.995 else f"{value:.1f}"


def phase_name(phase: str) -> str:
    """Return a phase as printed."""
    return PHASE_NAMES.get(phase, phase)


def link_name(link: str) -> str:
    """Return a kind of group as printed."""
    return _LINKS.get(link, link.upper())


def worst_phases(memory: Sequence[RankMemory]) -> dict[MemoryPhase, PhaseMemory]:
    """Return each phase of the stage that needs most in it."""
    worst: dict[MemoryPhase, PhaseMemory] = {}
    for rank in memory:
        for one in rank.phases:
            if one.phase not in worst or one.total > worst[one.phase].total:
                worst[one.phase] = one
    return worst


def memory_table(plan: Plan) -> Table:
    """Return the parts of each phase, on the stage that needs most in that phase."""
    phases = worst_phases(plan.memory)
    used = [part for part in PART_NAMES if any(part in one.parts for one in phases.values())]
    rows = [(PART_NAMES[part], *(_or_dash(one.parts.get(part, 0)) for one in phases.values())) for part in used]
    rows.append(("together", *(gib(one.total) for one in phases.values())))
    rows.append(("free", *(gib(plan.cluster.gpu_memory - one.total) for one in phases.values())))
    where = " (of the pipeline stage that needs most)" if len(plan.memory) > 1 else ""
    return Table(f"Memory of a GPU in each phase, GiB{where}", ("", *map(phase_name, phases)), tuple(rows))


def _or_dash(num_bytes: int) -> str:
    return gib(num_bytes) if num_bytes else "-"


def stages_table(plan: Plan) -> Table:
    """Return the memory of each pipeline stage; equal consecutive stages share a row."""
    rows: list[tuple[int, int, tuple[str, ...]]] = []
    for rank in plan.memory:
        totals = tuple(gib(one.total) for one in rank.phases)
        if rows and rows[-1][2] == totals:
            rows[-1] = (rows[-1][0], rank.stage, totals)
        else:
            rows.append((rank.stage, rank.stage, totals))
    named = tuple((str(a) if a == b else f"{a}-{b}", *totals) for a, b, totals in rows)
    columns = ("stage", *(phase_name(one.phase) for one in plan.memory[0].phases))
    return Table("Memory of a GPU of each pipeline stage, GiB", columns, named)


def host_table(plan: Plan) -> Table:
    """Return the host memory of a node by part."""
    rows = [(PART_NAMES[part], gib(size)) for part, size in plan.host.items()]  # type: ignore[index]
    rows.append(("together", gib(sum(plan.host.values()))))
    return Table("Memory of a node beside its GPUs, GiB", ("", "GiB"), tuple(rows))


def links_table(plan: Plan) -> Table:
    """Return the communication of a step, on the stage where it takes longest."""
    links = max(plan.links, key=lambda one: sum(link.seconds for link in one))
    rows = tuple(
        (
            phase_name(one.phase),
            link_name(one.link),
            str(one.group_size),
            str(one.nodes),
            str(one.operations),
            gib(one.sent),
            gib(one.inside),
            gib(one.network),
            f"{one.seconds:.3f}",
        )
        for one in links
    )
    columns = ("phase", "link", "ranks", "nodes", "operations", "sent", "inside the node", "network", "seconds")
    return Table("Communication of a GPU in a step, GiB that it sends", columns, rows, text_columns=2)


def time_table(plan: Plan) -> Table:
    """Return the estimated time of each phase."""
    rows = tuple(
        (
            phase_name(one.phase),
            f"{one.compute:.3f}",
            f"{one.communication:.3f}",
            f"{one.bubble:.3f}",
            f"{one.transfers:.3f}",
            f"{one.total:.3f}",
        )
        for one in plan.time.phases
    )
    columns = ("phase", "computing", "communication", "pipeline bubble", "host transfers", "together")
    return Table("Time of a step, seconds (estimate)", columns, rows)


def step_lines(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield what a step is made of, by name."""
    time = plan.time
    yield "time", format_seconds(time.mean) + _mean_of(plan)
    rate, each = format_count(time.tokens_per_second), format_count(time.tokens_per_second / plan.cluster.gpus)
    yield "tokens", f"{format_count(time.tokens)} a step, {rate} a second, {each} a second and GPU"
    petaflops = time.flops / 1e15
    share = f"{100 * time.flops_utilization:.0f} % of the GPUs' peak over the step"
    yield "FLOPs", f"{petaflops:.3g} PFLOP a step with what is recomputed, {share}"
    if plan.rollouts is not None and plan.rollouts.sampling is not None:
        one = plan.rollouts.sampling
        yield (
            "sampling",
            f"{one.rows} rows on each engine of {plan.rollouts.ranks} GPUs, {one.at_once} at once; "
            f"prompts of {one.prompt} and completions of {one.completion} tokens",
        )


def _mean_of(plan: Plan) -> str:
    time = plan.time
    if plan.rollouts is None:
        return ""
    steps = time.steps_per_generation
    often = f", once in {steps} steps" if steps > 1 else ""
    return (
        f" in the mean: {format_seconds(time.without_rollout)}, and {format_seconds(time.rollout)} to sample "
        f"where the student responds (lmbda {time.lmbda:g}{often})"
    )


def verdict(plan: Plan) -> Iterator[str]:
    """Yield whether the plan fits, or what does not and what helps."""
    memory = gib(plan.cluster.gpu_memory)
    if plan.fits:
        yield f"Fits: at most {gib(plan.peak)} of {memory} GiB, with the reserve."
        return
    for one in plan.shortfalls:
        yield _shortfall(one, memory)
        yield from (f"  - {remedy}" for remedy in one.remedies)


def _shortfall(one: Shortfall, memory: str) -> str:
    return (
        f"Does not fit: the phase {phase_name(one.phase)} needs {gib(one.needed)} of {memory} GiB on stage {one.stage}"
        f", {gib(one.over)} GiB too much; the largest part is {PART_NAMES[one.part]} with {gib(one.part_bytes)} GiB. "
        "What makes it smaller:"
    )

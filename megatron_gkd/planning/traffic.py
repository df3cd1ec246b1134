"""What each GPU sends in a step, over which links, and how long that takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_gkd.planning.cluster import Rates
from megatron_gkd.planning.costs import Traffic
from megatron_gkd.planning.placement import Placement, Spread


@dataclass(frozen=True)
class LinkTraffic:
    """The communication of one rank over one kind of group in one phase of a step.

    Attributes:
        phase: the part of the step.
        link: the kind of group.
        group_size: its ranks.
        nodes: over which they lie.
        operations: number of collectives, or of messages.
        sent: bytes that a GPU sends, as rings do.
        inside: those to GPUs of its node.
        network: those to other nodes, as the mean over the group's GPUs of a node.
        seconds: at the rates that are assumed, without waiting for other ranks.
    """

    phase: str
    link: str
    group_size: int
    nodes: int
    operations: int
    sent: float
    inside: float
    network: float
    seconds: float


def group_name(traffic: Traffic, placement: Placement) -> str:
    """Return the name by which the placement has the group of a traffic: joined dimensions differ in their size."""
    sizes = placement.sizes
    if traffic.group_size == placement.num_ranks > 1:
        return "world"
    if traffic.link == "dp" and traffic.group_size != sizes["dp"]:
        return "dp_cp"
    if traffic.link == "etp" and traffic.group_size != sizes["etp"]:
        return "tp_ep"
    if traffic.link == "cp" and traffic.group_size != sizes["cp"]:
        return "tp_cp"
    return traffic.link


def sum_links(traffic: Sequence[Traffic], rank: int, placement: Placement, rates: Rates) -> list[LinkTraffic]:
    """Return the traffic of a rank by phase and kind of group, in the order of its first appearance."""
    kinds: dict[tuple[str, str, int], list[Traffic]] = {}
    for one in traffic:
        if one.group_size > 1 and one.count:
            kinds.setdefault((one.phase, one.link, one.group_size), []).append(one)
    return [_sum(same, placement.spread(group_name(same[0], placement), rank), rates) for same in kinds.values()]


def sync_weights(num_bytes: int, rank: int, placement: Placement, rates: Rates) -> LinkTraffic | None:
    """Return the traffic by which every rank makes all weights whole for a rollout engine; None where it has them.

    It is that of an all-gather over the ranks that share the model or its experts, whichever are more.
    """
    spread = max((placement.spread(link, rank) for link in ("model", "tp_ep")), key=lambda one: one.size)
    if spread.size == 1:
        return None
    whole = Traffic("weight_sync", "pp", spread.size, "all_gather", num_bytes, 1)
    return replace(_sum([whole], spread, rates), link="model")


def _sum(same: Sequence[Traffic], spread: Spread, rates: Rates) -> LinkTraffic:
    inside = network = seconds = sent = 0.0
    operations = 0
    for one in same:
        near, far = _divide(one, spread)
        sent += near + far
        inside, network = inside + near, network + far
        seconds += _seconds(one, near, far, rates)
        operations += one.count
    first = same[0]
    return LinkTraffic(
        first.phase, first.link, first.group_size, spread.nodes, operations, sent, inside, network, seconds
    )


def ring_factor(operation: str, size: int) -> float:
    """Return the bytes that each rank sends over the bytes of the whole, in a ring of `size` ranks."""
    if operation == "all_reduce":
        return 2 * (size - 1) / size
    if operation in ("broadcast", "send"):
        return 1.0
    return (size - 1) / size


def _divide(one: Traffic, spread: Spread) -> tuple[float, float]:
    """Return the bytes that a GPU sends inside its node and to others."""
    sent = ring_factor(one.operation, one.group_size) * one.num_bytes * one.count
    if spread.is_inside_a_node:
        return sent, 0.0
    if one.operation == "all_to_all":  # to each of the others the same
        far = (one.group_size - spread.per_node) / (one.group_size - 1) if one.group_size > 1 else 0.0
    elif one.operation == "send":
        far = (spread.nodes - 1) / (spread.size - 1)
    else:  # a ring leaves a node once, and its GPUs share that
        far = 1 / max(1.0, spread.per_node)
    return sent * (1 - far), sent * far


def _seconds(one: Traffic, near: float, far: float, rates: Rates) -> float:
    """Return the time of the slower link: both carry at the same time."""
    if one.operation == "send" and far:  # the slowest of the stages' links sets the pace of all
        return (near + far) / rates.network
    return max(near / rates.nvlink, far / rates.network)

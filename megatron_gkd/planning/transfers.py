"""Collective operations and messages by the link that they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, cast

from megatron_gkd.planning.costs import Link, Operation, Phase, Traffic
from megatron_gkd.runtime.meter import Collective

Links = Mapping[str, tuple[str, int]]
"""The link and the number of ranks of each process group, by the group's name; see `links_of_groups`."""


class Transfer(NamedTuple):
    """A kind of operation; see `Traffic` for the attributes."""

    link: str
    group_size: int
    operation: str
    num_bytes: int


def by_link(collectives: Mapping[Collective, int], links: Links) -> Counter[Transfer]:
    """Return the operations between several ranks; groups that `links` does not have are those of one rank.

    Megatron sends some messages between two pipeline stages through the group of all ranks, to have a second stream.
    """
    stages = next((found for found in links.values() if found[0] == "pp"), None)
    transfers: Counter[Transfer] = Counter()
    for one, count in collectives.items():
        link = links.get(one.group_name)
        if link is not None and link[0] == "dp" and one.operation == "send":
            link = stages
        if link is not None:
            transfers[Transfer(*link, one.operation, one.num_bytes)] += count
    return transfers


def traffic_of(phase: Phase, transfers: Mapping[Transfer, int], times: int = 1) -> list[Traffic]:
    """Return the traffic of a phase in which operations are made so many times."""
    return [
        Traffic(
            phase, cast(Link, one.link), one.group_size, cast(Operation, one.operation), one.num_bytes, count * times
        )
        for one, count in transfers.items()
        if count
    ]

"""Which ranks share a group, and over how many nodes they lie.

Megatron-Core numbers ranks in the order tp, cp, dp, pp, and for experts expert tp, ep, expert dp, pp; the first changes
fastest (`parallel_state.initialize_model_parallel`, order "tp-cp-ep-dp-pp").
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_gkd.config.schema import ParallelSection

_DENSE = ("tp", "cp", "dp", "pp")
_EXPERT = ("etp", "ep", "expert_dp", "pp")
_COMBINED = {
    "dp_cp": (_DENSE, ("cp", "dp")),
    "tp_cp": (_DENSE, ("tp", "cp")),
    "model": (_DENSE, ("tp", "pp")),
    "tp_ep": (_EXPERT, ("etp", "ep")),
    "world": (_DENSE, _DENSE),
}


@dataclass(frozen=True)
class Spread:
    """Where the ranks of a group are.

    Attributes:
        size: number of ranks.
        nodes: number of nodes.
    """

    size: int
    nodes: int

    @property
    def per_node(self) -> float:
        """Mean number of the group's ranks on one of its nodes."""
        return self.size / self.nodes

    @property
    def is_inside_a_node(self) -> bool:
        """Whether all ranks are on one node."""
        return self.nodes == 1


@dataclass(frozen=True)
class Placement:
    """The groups of a layout over nodes that have consecutive ranks.

    Attributes:
        sizes: of each dimension, by its name.
        gpus_per_node: ranks of a node.
    """

    sizes: dict[str, int]
    gpus_per_node: int

    @classmethod
    def of(cls, parallel: ParallelSection, gpus: int, gpus_per_node: int) -> Placement:
        """Return the placement of a recipe's layout, which must divide the GPUs."""
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
        etp = parallel.expert_tensor_parallel_size
        sizes = {"tp": tp, "cp": cp, "dp": gpus // (tp * cp * pp), "pp": pp}
        sizes |= {"etp": etp, "ep": ep, "expert_dp": gpus // (etp * ep * pp)}
        return cls(sizes, gpus_per_node)

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the world."""
        return math.prod(self.sizes[dimension] for dimension in _DENSE)

    def group(self, link: str, rank: int) -> list[int]:
        """Return the ranks of the group of a link that `rank` is a member of.

        Args:
            link: `tp`, `cp`, `dp`, `pp`, `etp`, `ep`, `expert_dp`, or `dp_cp`, `tp_cp`, `model` (tp and pp), `tp_ep`
                (expert tp and ep), `world`.
            rank: of the world.
        """
        order, members = _COMBINED.get(link) or (_EXPERT if link in _EXPERT[:3] else _DENSE, (link,))
        ranks, stride = [rank], 1
        for dimension in order:
            size = self.sizes[dimension]
            if dimension in members:
                first = rank // stride % size
                ranks = [other + (index - first) * stride for index in range(size) for other in ranks]
            stride *= size
        return sorted(ranks)

    def spread(self, link: str, rank: int) -> Spread:
        """Return where the ranks of a group are; see `group`."""
        ranks = self.group(link, rank)
        return Spread(len(ranks), len({one // self.gpus_per_node for one in ranks}))

"""The groups of a layout are Megatron's, and nodes are counted from them."""

import pytest

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.config.schema import ParallelSection
from megatron_gkd.planning.placement import Placement

from megatron.core.parallel_state import RankGenerator

ORDER = "tp-cp-ep-dp-pp"
LAYOUTS = [  # tp, pp, cp, ep, etp
    (1, 1, 1, 1, 1),
    (4, 2, 2, 8, 1),
    (2, 4, 1, 4, 2),
    (8, 2, 2, 16, 1),
    (2, 1, 4, 2, 4),
]


def placement(tp, pp, cp, ep, etp, gpus=64, node=8):
    section = ParallelSection(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
    )
    return Placement.of(section, gpus, node)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_megatrons(layout):
    tp, pp, cp, ep, etp = layout
    ours = placement(*layout)
    dense = RankGenerator(tp=tp, ep=1, dp=64 // (tp * pp * cp), pp=pp, cp=cp, order=ORDER)
    expert = RankGenerator(tp=etp, ep=ep, dp=64 // (etp * ep * pp), pp=pp, cp=1, order=ORDER)
    names = {"tp": "tp", "cp": "cp", "dp": "dp", "pp": "pp", "dp_cp": "dp-cp", "tp_cp": "tp-cp", "model": "tp-pp"}
    expert_names = {"etp": "tp", "ep": "ep", "expert_dp": "dp", "tp_ep": "tp-ep"}
    for generator, tokens in ((dense, names), (expert, expert_names)):
        for link, token in tokens.items():
            for group in generator.get_ranks(token):
                for rank in group:
                    assert ours.group(link, rank) == sorted(group), (link, rank)


def test_nodes_of_a_group_are_counted():
    ours = placement(tp=4, pp=2, cp=1, ep=16, etp=1)
    assert ours.spread("tp", 5).nodes == 1
    assert ours.spread("dp", 0).size == 8 and ours.spread("dp", 0).nodes == 4  # every fourth of 32 ranks
    assert ours.spread("pp", 0).nodes == 2
    assert ours.spread("world", 3).size == 64 and ours.spread("world", 3).nodes == 8
    assert ours.spread("ep", 20).nodes == 2 and ours.spread("ep", 20).per_node == 8
    assert ours.spread("ep", 20).is_inside_a_node is False


def test_a_node_of_other_sizes_moves_the_border():
    assert placement(4, 1, 1, 1, 1, node=4).spread("tp", 0).is_inside_a_node
    assert placement(4, 1, 1, 1, 1, node=2).spread("tp", 0).nodes == 2

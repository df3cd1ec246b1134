"""Bytes and times of collectives by the links that carry them."""

import pytest
from planning.handmade import DEVICE, EXACT, traffic

from megatron_gkd.planning.cluster import GB, Rates
from megatron_gkd.planning.placement import Placement
from megatron_gkd.planning.traffic import ring_factor, sum_links, sync_weights

RATES = Rates.of(DEVICE, EXACT)  # NVLink 100 GB/s, network 10 GB/s


def placement(**sizes):
    return Placement({name: 1 for name in ("tp", "cp", "dp", "pp", "etp", "ep", "expert_dp")} | sizes, 8)


@pytest.mark.parametrize(
    ("operation", "factor"),
    [("all_reduce", 1.5), ("all_gather", 0.75), ("reduce_scatter", 0.75), ("all_to_all", 0.75), ("send", 1)],
)
def test_ring_factors(operation, factor):
    assert ring_factor(operation, 4) == factor


def test_inside_a_node_nvlink_carries_all():
    (one,) = sum_links([traffic("student", "tp", 4, "all_gather", 4 * GB, 10)], 0, placement(tp=4, dp=4), RATES)
    assert (one.sent, one.inside, one.network) == (30 * GB, 30 * GB, 0)
    assert one.nodes == 1 and one.operations == 10 and one.seconds == pytest.approx(0.3)


def test_a_ring_over_nodes_leaves_each_node_once():
    # 16 ranks on 2 nodes: of 8 GPUs on a node one sends to the other node, and all 8 adapters share that.
    (one,) = sum_links([traffic("update", "dp", 16, "reduce_scatter", 16 * GB)], 3, placement(dp=16), RATES)
    assert one.sent == 15 * GB and one.network == pytest.approx(15 * GB / 8)
    assert one.seconds == pytest.approx(15 / 8 / 10)


def test_a_ring_with_one_rank_on_a_node_is_the_networks():
    (one,) = sum_links([traffic("update", "dp", 2, "all_reduce", 1 * GB)], 0, placement(tp=8, dp=2), RATES)
    assert (one.nodes, one.inside) == (2, 0) and one.seconds == pytest.approx(0.1)


def test_all_to_all_sends_the_same_to_each_rank():
    (one,) = sum_links([traffic("teacher", "ep", 16, "all_to_all", 16 * GB)], 0, placement(dp=16, ep=16), RATES)
    assert one.network == pytest.approx(8 * GB) and one.inside == pytest.approx(7 * GB)
    assert one.seconds == pytest.approx(0.8)


def test_operations_of_a_phase_and_link_are_one_line():
    gathers = [traffic("student", "tp", 2, kind, 2 * GB) for kind in ("all_gather", "reduce_scatter")]
    both = [*gathers, traffic("teacher", "tp", 2, "all_gather", 2 * GB), traffic("teacher", "cp", 1, "send", 5)]
    found = sum_links(both, 0, placement(tp=2, dp=8), RATES)
    assert [(one.phase, one.operations, one.sent) for one in found] == [("student", 2, 2 * GB), ("teacher", 1, GB)]


def test_joined_groups_are_found_by_their_size():
    where = placement(tp=4, cp=2, dp=2, etp=2, ep=4, expert_dp=2)
    links = [traffic("update", "dp", 4, "all_reduce", GB), traffic("student", "etp", 8, "all_gather", GB)]
    assert [one.nodes for one in sum_links(links, 0, where, RATES)] == [2, 1]


def test_weights_for_an_engine_are_gathered_over_the_model():
    assert sync_weights(GB, 0, placement(dp=16), RATES) is None
    one = sync_weights(16 * GB, 0, placement(tp=8, pp=2), RATES)
    assert (one.phase, one.link, one.group_size, one.nodes) == ("weight_sync", "model", 16, 2)
    assert one.sent == 15 * GB

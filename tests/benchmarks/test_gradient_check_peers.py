"""The comparison of gradients over two processes finds wrong ones."""

import pytest
from benchmarks import gradient_check_peers
from benchmarks.measure import OURS


def test_ours_is_exact_and_autograd_through_all_reduce_is_not():
    records = gradient_check_peers.check(sites=[], betas=(0.0, 0.5))
    found = {(record["contestant"], record["beta"]): record for record in records}
    for beta in (0.0, 0.5):
        exact, plain = found[OURS, beta], found["plain all_reduce", beta]
        assert exact["gradient_error"] < 1e-5 and exact["loss_error"] < 1e-5
        assert exact["cosine"] == pytest.approx(1.0, abs=1e-6)
        assert plain["loss_error"] < 1e-5  # the loss alone does not show it
        assert plain["gradient_error"] > 0.1 and plain["cosine"] < 0.99
    for record in records:
        assert "cosine" in record or record["reason"]
    rows = gradient_check_peers.section(records).rows
    assert {row[0].split(":")[0].split()[0] for row in rows} == {OURS, "plain", *gradient_check_peers.PEERS}

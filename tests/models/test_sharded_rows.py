"""Rows that are distributed over ranks take a share of the memory and are gathered unchanged."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

COUNTS = (0, 1, 2, 5, 6)


def shard_and_gather(rank, world_size, dtype):
    """For each number of rows: the bytes that this rank holds, and whether the gathered rows are the original ones."""
    from megatron_gkd.models.sharded_rows import ShardedRows

    found = []
    for count in COUNTS:
        rows = torch.randn(count + 3, 4, generator=torch.Generator().manual_seed(count)).to(dtype)[3:]
        sharded = ShardedRows.from_replicated(rows, dist.group.WORLD)
        found.append((sharded.shard.untyped_storage().nbytes(), torch.equal(sharded.gather(), rows)))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rank_holds_its_share_and_gathers_all(gloo_world, world_size, dtype):
    for found in gloo_world(world_size).run(shard_and_gather, dtype):
        assert found == [(-(-count // world_size) * 4 * dtype.itemsize, True) for count in COUNTS]


def test_one_rank_has_all_rows(gloo_world):
    assert all(is_same for _, is_same in gloo_world(1).run(shard_and_gather, torch.float32)[0])

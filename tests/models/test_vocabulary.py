from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from checkpoints import tiny_checkpoint

from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.vocabulary import reshard_head, shared_vocab_size
from megatron_gkd.ops.output_head import OutputHead


def test_the_shared_ids_are_those_of_the_smaller_embedding():
    small, large = (Checkpoint.open(str(tiny_checkpoint("qwen3", vocab_size=size))) for size in (99, 112))
    assert shared_vocab_size(small, large) == shared_vocab_size(large, small) == 99


def lay_out(rank, world_size, old_rows, new_rows):
    whole = torch.arange(world_size * old_rows * 2, dtype=torch.float32).view(-1, 2)
    shard = whole[rank * old_rows : (rank + 1) * old_rows].clone()
    head = OutputHead(shard, shard[:, 1].clone(), scale=0.5, softcap=7.0)
    laid_out = reshard_head(head, new_rows, dist.group.WORLD)
    assert (laid_out.weight.data_ptr() == shard.data_ptr()) == (old_rows == new_rows)
    assert torch.equal(laid_out.bias, laid_out.weight[:, 1])
    assert (laid_out.scale, laid_out.softcap) == (0.5, 7.0)
    return laid_out.weight


@pytest.mark.parametrize(("old_rows", "new_rows"), [(5, 5), (5, 3), (5, 7), (5, 11)])
def test_a_head_is_resharded(old_rows, new_rows, gloo_world):
    cut = torch.cat(gloo_world(2).run(lay_out, old_rows, new_rows))
    kept = min(2 * old_rows, 2 * new_rows)
    assert torch.equal(cut[:kept], torch.arange(2 * kept, dtype=torch.float32).view(-1, 2))
    assert not cut[kept:].any()

"""Compare two models over one vocabulary: which ids they share, and on which rank the logits of each id are.

Checkpoints of one family pad their embeddings differently (151936 rows against 152064), so that their tensor-parallel
shards do not hold the same ids. The teacher's head is resharded once over the student's ids; ids that only one model
has are masked in both.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.ops.output_head import OutputHead


def shared_vocab_size(student: Checkpoint, teacher: Checkpoint) -> int:
    """Return the number of ids that both models have logits for."""
    return min(student.vocab_size, teacher.vocab_size)


@torch.no_grad()
def reshard_head(head: OutputHead, rows: int, group: dist.ProcessGroup) -> OutputHead:
    """Change a vocabulary-parallel head from shards of R rows to shards of `rows`. All ranks of `group` must call it.

    Returns:
        This rank's shard, without gradient, in which missing ids are zeros; the same tensors if R = rows.
    """
    bias = None if head.bias is None else _reshard(head.bias.data, rows, group)
    return head.with_tensors(_reshard(head.weight.data, rows, group), bias)


def _reshard(shard: torch.Tensor, rows: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Change shards [R, ...] to shards [rows, ...]."""
    if shard.shape[0] == rows:
        return shard
    whole = shard.new_empty((shard.shape[0] * group.size(), *shard.shape[1:]))
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
    mine = whole[group.rank() * rows : (group.rank() + 1) * rows]
    resharded = shard.new_zeros((rows, *shard.shape[1:]))
    resharded[: mine.shape[0]] = mine
    return resharded

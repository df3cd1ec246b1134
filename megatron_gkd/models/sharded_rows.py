"""Distribute the rows of a matrix over the ranks of a group until they are needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class ShardedRows:
    """N rows, of which each rank of `group` holds ceil(N / ranks), in the order of the ranks.

    Attributes:
        shard: [ceil(N / ranks), H], this rank's rows; zeros after the last one.
        num_rows: N.
        group: the ranks that hold the rows.
    """

    shard: Tensor
    num_rows: int
    group: dist.ProcessGroup

    @classmethod
    def from_replicated(cls, rows: Tensor, group: dist.ProcessGroup) -> ShardedRows:
        """Copy this rank's part of `rows` [N, H], which every rank of `group` has; keep no reference to the rest."""
        size = group.size()
        if size == 1:
            return cls(rows, len(rows), group)
        per_rank = -(-len(rows) // size)
        mine = rows[group.rank() * per_rank : (group.rank() + 1) * per_rank]
        shard = rows.new_zeros(per_rank, *rows.shape[1:])
        shard[: len(mine)] = mine
        return cls(shard, len(rows), group)

    def gather(self) -> Tensor:
        """Return the matrix [N, H] on every rank. All ranks of the group must call it."""
        size = self.group.size()
        if size == 1 or self.num_rows == 0:
            return self.shard
        whole = self.shard.new_empty(size * len(self.shard), *self.shard.shape[1:])
        dist.all_gather_into_tensor(whole, self.shard, group=self.group)
        return whole[: self.num_rows]

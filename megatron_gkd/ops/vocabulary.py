"""Which columns of the vocabulary this rank holds, and how the ranks of its group exchange numbers per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Equal shards of a padded vocabulary, in rank order over `group` (None: one shard holds everything)."""

    group: dist.ProcessGroup | None
    width: int  # columns of every shard, padding included
    first: int  # global id of this shard's first column
    valid: int  # how many of its leading columns belong to the true vocabulary; the rest are padding
    vocab_size: int  # the true size, over all shards

    @classmethod
    def of(cls, width: int, group: dist.ProcessGroup | None = None, vocab_size: int | None = None) -> VocabShard:
        """This rank's shard of `width` columns, for a true vocabulary of `vocab_size` (default: no padding).

        ValueError for a `vocab_size` that the shards together don't hold.
        """
        ranks = 1 if group is None else group.size()
        first = 0 if group is None else group.rank() * width
        vocab_size = ranks * width if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= ranks * width:
            raise ValueError(
                f"vocab_size is {vocab_size}; allowed are 1 to {ranks * width}: {ranks} shard(s) of {width} columns"
            )
        return cls(group, width, first, min(max(vocab_size - first, 0), width), vocab_size)

    def gather(self, local: Tensor) -> Tensor:
        """[R, *local.shape]: the tensors of all R ranks in rank order. One collective; none for one rank or no data.

        Reductions over the ranks are made of this, not of all_reduce: every rank then adds the same numbers in the same
        order, and all hold the same bits. It is a few numbers a token.
        """
        if self.group is None or self.group.size() == 1 or local.numel() == 0:
            return local.unsqueeze(0)
        gathered = local.new_empty(self.group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        return gathered.view(self.group.size(), *local.shape)

    def owned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(bool, int64) of the shape of global `ids`: whether the id is a valid column here, and which (0 if not)."""
        column = ids - self.first
        here = (column >= 0) & (column < self.valid)
        return here, torch.where(here, column, 0)


def name_of_group(group: dist.ProcessGroup | None) -> str:
    """What operators of torch.library take in the group's place; empty for None."""
    return "" if group is None else group.group_name


def group_of_name(name: str) -> dist.ProcessGroup | None:
    return torch.distributed.distributed_c10d._resolve_process_group(name) if name else None

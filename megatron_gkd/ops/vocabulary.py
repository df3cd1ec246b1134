"""Which columns of the vocabulary this rank holds, and how the ranks of its group exchange numbers per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class VocabShard:
    """Describe this rank's shard of a padded vocabulary, which is split into equal shards in rank order.

    Attributes:
        group: the ranks that share the vocabulary; None where one shard holds everything.
        width: columns of every shard, padding included.
        first: global id of this shard's first column.
        valid: how many of its leading columns belong to the true vocabulary; the others are padding.
        vocab_size: the true size, over all shards.
        meanwhile: called by each ``gather`` between the collective's start and its end; None: nothing.
    """

    group: dist.ProcessGroup | None
    width: int
    first: int
    valid: int
    vocab_size: int
    meanwhile: Callable[[], None] | None = field(default=None, compare=False)

    @classmethod
    def from_group(
        cls, width: int, group: dist.ProcessGroup | None = None, vocab_size: int | None = None
    ) -> VocabShard:
        """Return this rank's shard of `width` columns, for a true vocabulary of `vocab_size` (None: no padding).

        Raises:
            ValueError: the shards together do not hold `vocab_size` columns.
        """
        ranks = 1 if group is None else group.size()
        first = 0 if group is None else group.rank() * width
        vocab_size = ranks * width if vocab_size is None else vocab_size
        if not 1 <= vocab_size <= ranks * width:
            raise ValueError(
                f"vocab_size = {vocab_size}: must be from 1 to {ranks * width}, {ranks} shard(s) of {width} columns"
            )
        return cls(group, width, first, min(max(vocab_size - first, 0), width), vocab_size)

    def gather(self, local: Tensor) -> Tensor:
        """Gather a tensor of every rank: [R, *local.shape], in rank order, by at most one collective.

        Reductions over the ranks use this and not all_reduce: every rank then adds the same numbers in the same order,
        and all hold the same bits. It is a few numbers per token.
        """
        if self.group is None or self.group.size() == 1 or local.numel() == 0:
            return local.unsqueeze(0)
        gathered = local.new_empty(self.group.size() * local.shape[0], *local.shape[1:])
        if self.meanwhile is None:
            dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group)
        else:
            work = dist.all_gather_into_tensor(gathered, local.contiguous(), group=self.group, async_op=True)
            self.meanwhile()
            work.wait()
        return gathered.view(self.group.size(), *local.shape)

    def owned(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return which global ids are valid columns here (bool), and their columns (int64; 0 where they are not)."""
        column = ids - self.first
        here = (column >= 0) & (column < self.valid)
        return here, torch.where(here, column, 0)


def name_of_group(group: dist.ProcessGroup | None) -> str:
    """Return the string that stands for a group in operators of torch.library; empty for None."""
    return "" if group is None else group.group_name


def group_of_name(name: str) -> dist.ProcessGroup | None:
    """Return the group that ``name_of_group`` named."""
    if not name:
        return None
    resolve = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)  # type: ignore[arg-type]  # torch's type of names, GroupName, is missing in torch 2.6

"""Keep rows of a matrix in page-locked host memory until they are needed."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.models.host_memory import HostMemory
from megatron_gkd.models.sharded_rows import ShardedRows


def copy_stream() -> torch.cuda.Stream:
    """Return a new stream for `HostRows`."""
    return torch.cuda.Stream()


class HostRows:
    """`ShardedRows` whose shard is copied to the host at once, and back on a side stream.

    Args:
        rows: whose shard is on the device; no reference to it is kept.
        stream: copies the rows back.
    """

    def __init__(self, rows: ShardedRows, stream: torch.cuda.Stream) -> None:
        self._stream, self._like = stream, replace(rows, shard=rows.shard.new_empty(0, *rows.shard.shape[1:]))
        self._rows_of_shard = len(rows.shard)
        self._memory = HostMemory(rows.shard.nbytes)
        self._memory.write(0, rows.shard)  # in the order of the main stream, which frees the shard
        self._fetched: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows of the matrix."""
        return self._like.num_rows

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that hold the rows."""
        return self._like.group

    @property
    def shard(self) -> Tensor:
        """This rank's rows, on the device; see ``ShardedRows.shard``. They stay there until `gather`."""
        self.prefetch()
        torch.cuda.current_stream().wait_stream(self._stream)
        if self._fetched is None:
            raise AssertionError("`prefetch` has allocated the rows")
        return self._fetched

    def prefetch(self) -> None:
        """Start to copy this rank's rows to the device. Ranks need not call it together."""
        if self._fetched is not None:
            return
        like = self._like.shard
        self._fetched = like.new_empty(self._rows_of_shard, *like.shape[1:])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._memory.read(0, self._fetched)

    def gather(self) -> Tensor:
        """Return the matrix [N, H] on every rank. All ranks of the group must call it."""
        whole = replace(self._like, shard=self.shard).gather()
        self._fetched = None
        return whole


Rows = ShardedRows | HostRows

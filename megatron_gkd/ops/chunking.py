"""Into which chunks of tokens the fused head divides its work, and the buffers of a chunk's logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops import scratch
from megatron_gkd.ops.output_head import OutputHead

# Each chunk reads and writes the gradient of the whole head, so products are slower with small chunks. A CPU has less
# memory to spare, and gains nothing from larger ones.
GPU_LOGITS_BYTES = 2 << 30
CPU_LOGITS_BYTES = 1 << 30
# Matrix products are fast where rows start at a multiple of 16 bytes, and where they have whole tiles of rows.
STRIDE_ELEMENTS = 8
TILE_ROWS = 128


def row_stride(columns: int) -> int:
    """Return the distance of two rows of logits of `columns` columns, in elements."""
    return -(-columns // STRIDE_ELEMENTS) * STRIDE_ELEMENTS


def rows_within_budget(columns: int, dtype: torch.dtype, device: torch.device, buffers: int = 1) -> int:
    """Return how many rows of logits fit into `buffers` buffers of the default size together, at least one."""
    budget = CPU_LOGITS_BYTES if device.type == "cpu" else GPU_LOGITS_BYTES
    return max(1, budget // (buffers * max(row_stride(columns), 1) * dtype.itemsize))


def split_tokens(tokens: int, most: int) -> list[slice]:
    """Return as few chunks as possible of at most `most` tokens: of equal size, or of whole tiles where they are large.

    Equal chunks differ by one token at most; the last one of chunks of whole tiles may be smaller.
    """
    count = -(-tokens // most)
    if count > 1:
        in_tiles = -(-tokens // (count * TILE_ROWS)) * TILE_ROWS
        if 8 * TILE_ROWS <= in_tiles <= most:
            return [slice(start, min(start + in_tiles, tokens)) for start in range(0, tokens, in_tiles)]
    return [slice(tokens * i // count, tokens * (i + 1) // count) for i in range(count)]


@dataclass(frozen=True)
class Chunking:
    """Hold how the tokens are divided.

    Attributes:
        chunks: of the tokens, in order.
        is_overlapped: whether the products of a chunk's gradients wait for the next chunk's collectives. The gradient
            by the student's logits then needs a buffer beside that of the next logits.
    """

    chunks: list[slice]
    is_overlapped: bool

    @classmethod
    def choose(
        cls, hidden: Tensor, columns: int, models: int, chunk_tokens: int | None, *, may_overlap: bool
    ) -> Chunking:
        """Choose chunks of hidden states [N, H].

        Args:
            hidden: the hidden states.
            columns: of the logits of every rank, padding included.
            models: how many models have logits.
            chunk_tokens: most tokens of a chunk; None: as many as fit into the default size of all buffers.
            may_overlap: whether there are collectives, and products to overlap them with.
        """

        def most(buffers: int) -> int:
            return chunk_tokens or rows_within_budget(columns, hidden.dtype, hidden.device, buffers)

        tokens = len(hidden)
        if tokens <= most(models) or not may_overlap:
            return cls(split_tokens(tokens, most(models)), False)
        return cls(split_tokens(tokens, most(models + 1)), True)


class ChunkedHead:
    """Compute the logits of chunks of tokens into buffers by turns. Padding rows of the weight are never multiplied."""

    def __init__(self, hidden: Tensor, head: OutputHead, valid: int, chunks: list[slice], buffers: int = 1) -> None:
        """Allocate the buffers.

        Args:
            hidden: [N, H].
            head: this rank's rows.
            valid: how many of them belong to the true vocabulary.
            chunks: of the N tokens.
            buffers: how many chunks' logits exist at once.
        """
        self.hidden, self.head = hidden, head.rows(valid)
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        self._buffers = [scratch.take(hidden, rows, row_stride(valid))[:, :valid] for _ in range(buffers)]

    def logits(self, chunk: slice) -> Tensor:
        """Return the logits of a chunk; they are overwritten after as many further calls as there are buffers."""
        buffer = self._buffers.pop(0)
        self._buffers.append(buffer)
        hidden = self.hidden[chunk]
        return self.head.compute_logits(hidden, out=buffer[: len(hidden)])

    def release(self) -> None:
        """Let the next heads reuse the buffers, whose logits are no longer read."""
        while self._buffers:
            scratch.give_back(self._buffers.pop())

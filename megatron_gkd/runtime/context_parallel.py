"""Positions of a microbatch that a context-parallel rank holds."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, arange, cat, int64


def context_parallel_indices(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Return the positions, in the whole microbatch, of a context-parallel rank's tokens.

    The layout is the zigzag of Megatron-Core and Transformer Engine for packed sequences: each sequence is split into
    2 * size chunks, of which rank r holds chunks r and 2 * size - 1 - r, so that causal attention costs every rank the
    same. The sequences stay in their order.

    Args:
        cu_seqlens: int [S + 1], boundaries of the padded sequences of the whole microbatch.
        rank: context-parallel rank.
        size: number of context-parallel ranks.

    Returns:
        int64 [T / size] on the device of `cu_seqlens`.

    Raises:
        ValueError: the length of a sequence is not a multiple of 2 * size (unless size is 1).
    """
    boundaries = cu_seqlens.tolist()
    device = cu_seqlens.device
    if size == 1:
        return arange(boundaries[-1], dtype=int64, device=device)
    pieces = []
    for start, end in pairwise(boundaries):
        chunk, remainder = divmod(end - start, 2 * size)
        if remainder:
            raise ValueError(f"a sequence of {end - start} tokens cannot be split into {2 * size} equal chunks")
        for index in (rank, 2 * size - 1 - rank):
            first = start + index * chunk
            pieces.append(arange(first, first + chunk, dtype=int64, device=device))
    return cat(pieces)

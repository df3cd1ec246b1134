"""Division of the rows of a global batch over data-parallel ranks and microbatches."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.microbatch import padded_length

Bin = list[int]  # positions of rows that share a microbatch


def plan_microbatches(lengths: Sequence[int], config: BatchConfig, patches: Sequence[int] = ()) -> list[list[Bin]]:
    """Plan the microbatches of one step. Pure and deterministic: every rank computes the same plan.

    Packed microbatches are filled by first-fit decreasing, up to `max_length` tokens and `max_patches` patches.

    Args:
        lengths: tokens of each row of the global batch, without padding.
        config: batch sizes, padding and number of data-parallel ranks.
        patches: of the images of each row; empty where no row has any.

    Returns:
        `plan[dp_rank][microbatch]`, a list of positions in `lengths`. Every rank has the same number of microbatches,
        the largest first, and about as many tokens as the others.

    Raises:
        ValueError: the number of rows is not a multiple of `dp_size * microbatch_multiple` (times `micro_batch_size`
            unpacked).
    """
    rank_divisor = config.dp_size * config.microbatch_multiple
    divisor = rank_divisor * (1 if config.packing else config.micro_batch_size)
    if not lengths or len(lengths) % divisor:
        raise ValueError(f"{len(lengths)} rows cannot be divided: not a positive multiple of {divisor}")
    padded = [padded_length(length, config.pad_multiple) for length in lengths]
    if config.packing:
        bins = _split(_first_fit_decreasing(_Sizes.from_config(padded, patches, config)), padded, rank_divisor)
    else:
        size = config.micro_batch_size
        bins = [list(range(start, start + size)) for start in range(0, len(padded), size)]
    return _assign(bins, padded, config.dp_size)


def _tokens(bin_: Bin, lengths: Sequence[int]) -> int:
    return sum(lengths[row] for row in bin_)


def _longest_first(rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
    return sorted(rows, key=lambda row: (-lengths[row], row))


@dataclass(frozen=True)
class _Sizes:
    """What rows take of a microbatch: tokens and patches of images, and how many of each it has room for."""

    tokens: Sequence[int]
    patches: Sequence[int]
    max_tokens: int
    max_patches: int

    @classmethod
    def from_config(cls, tokens: Sequence[int], patches: Sequence[int], config: BatchConfig) -> _Sizes:
        if config.max_patches is None or not patches:
            return cls(tokens, [0] * len(tokens), config.max_length, 1)
        return cls(tokens, patches, config.max_length, config.max_patches)

    def largest_first(self) -> list[int]:
        """Return the rows by the larger of their two shares of a microbatch."""

        def share(row: int) -> int:  # of both limits multiplied, to compare whole numbers
            return max(self.tokens[row] * self.max_patches, self.patches[row] * self.max_tokens)

        return sorted(range(len(self.tokens)), key=lambda row: (-share(row), row))


def _first_fit_decreasing(sizes: _Sizes) -> list[Bin]:
    bins: list[Bin] = []
    space: list[tuple[int, int]] = []  # tokens and patches
    for row in sizes.largest_first():
        tokens, patches = sizes.tokens[row], sizes.patches[row]
        for index, (free_tokens, free_patches) in enumerate(space):
            if tokens <= free_tokens and (patches <= free_patches or patches == 0):
                bins[index].append(row)
                space[index] = (free_tokens - tokens, free_patches - patches)
                break
        else:
            bins.append([row])
            space.append((sizes.max_tokens - tokens, sizes.max_patches - patches))
    return bins


def _split(bins: list[Bin], lengths: Sequence[int], divisor: int) -> list[Bin]:
    """Halve the largest bins until their number is a multiple of `divisor`, which must divide the number of rows."""
    single = [bin_ for bin_ in bins if len(bin_) == 1]
    heap = [(-_tokens(bin_, lengths), bin_) for bin_ in bins if len(bin_) > 1]
    heapq.heapify(heap)
    while (len(single) + len(heap)) % divisor:
        _, largest = heapq.heappop(heap)
        for half in _halves(largest, lengths):
            if len(half) == 1:
                single.append(half)
            else:
                heapq.heappush(heap, (-_tokens(half, lengths), half))
    return single + [bin_ for _, bin_ in heap]


def _halves(bin_: Bin, lengths: Sequence[int]) -> tuple[Bin, Bin]:
    halves: tuple[Bin, Bin] = ([], [])
    tokens = [0, 0]
    for row in _longest_first(bin_, lengths):
        lighter = 0 if (tokens[0] <= tokens[1] and halves[1]) or not halves[0] else 1
        halves[lighter].append(row)
        tokens[lighter] += lengths[row]
    return halves


def _assign(bins: list[Bin], lengths: Sequence[int], dp_size: int) -> list[list[Bin]]:
    """Assign the bins, largest first, each to the rank with the fewest tokens among those that may take one more."""
    bins_per_rank = len(bins) // dp_size
    plan: list[list[Bin]] = [[] for _ in range(dp_size)]
    tokens = [0] * dp_size
    for bin_ in sorted(bins, key=lambda bin_: (-_tokens(bin_, lengths), min(bin_))):
        rank = min((r for r in range(dp_size) if len(plan[r]) < bins_per_rank), key=lambda r: tokens[r])
        plan[rank].append(sorted(bin_))
        tokens[rank] += _tokens(bin_, lengths)
    return plan

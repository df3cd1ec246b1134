"""Cuts a global batch into the microbatches of one data-parallel and context-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_gkd.data.microbatch import Microbatch, collate, lengthen, padded_length, shard_context_parallel
from megatron_gkd.data.packing import plan_microbatches
from megatron_gkd.data.sample import Sample


@dataclass(frozen=True)
class Cutting:
    """Nothing is communicated: every rank computes the plan.

    Attributes:
        micro_batch_size: rows of a microbatch where `packing` is false.
        packing: fill microbatches up to `max_length` tokens with whole rows.
        max_length: tokens of a packed microbatch.
        dp_rank, dp_size: data-parallel rank and number of ranks.
        cp_rank, cp_size: context-parallel rank and number of ranks.
        pad_multiple: each sequence is padded to a multiple of this.
        pad_token_id: id of padding.
        microbatch_multiple: the number of microbatches of a rank is a multiple of this.
        equal_lengths: lengthen a rank's microbatches of a step to the longest of them, with padding.
    """

    micro_batch_size: int
    packing: bool
    max_length: int
    dp_rank: int
    dp_size: int
    cp_rank: int
    cp_size: int
    pad_multiple: int
    pad_token_id: int
    microbatch_multiple: int = 1
    equal_lengths: bool = False

    def microbatches(self, lengths: Sequence[int], sample_at: Callable[[int], Sample]) -> list[Microbatch]:
        """Of the rows of a global batch: their lengths in tokens, and what is at a position (asked for own rows only).

        Raises:
            ValueError: the rows can't be divided over the ranks; see ``packing.plan_microbatches``.
        """
        return self.cut(self.bins(lengths), sample_at)

    def bins(self, lengths: Sequence[int]) -> list[list[int]]:
        """The positions that each microbatch of this rank holds, in order. Raises as `microbatches` does."""
        plan = plan_microbatches(
            [padded_length(length, self.pad_multiple) for length in lengths],
            micro_batch_size=self.micro_batch_size,
            packing=self.packing,
            max_length=self.max_length,
            dp_size=self.dp_size,
            multiple_of=self.microbatch_multiple,
        )
        return plan[self.dp_rank]

    def cut(self, bins: Sequence[Sequence[int]], sample_at: Callable[[int], Sample]) -> list[Microbatch]:
        """The microbatches that hold these positions."""
        padding = {"pad_multiple": self.pad_multiple, "pad_token_id": self.pad_token_id}
        whole = [collate([sample_at(position) for position in bin_], **padding) for bin_ in bins]
        if self.equal_lengths:
            longest = max(microbatch.total_length for microbatch in whole)
            whole = [lengthen(microbatch, longest, self.pad_token_id) for microbatch in whole]
        return [shard_context_parallel(microbatch, self.cp_rank, self.cp_size) for microbatch in whole]

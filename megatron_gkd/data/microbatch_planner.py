"""Division of a batch of rows into the microbatches of one data-parallel and context-parallel rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.microbatch import Microbatch, add_pixels, collate, pad_to, shard_context_parallel
from megatron_gkd.data.packing import Bin, plan_microbatches
from megatron_gkd.data.sample import Sample


@dataclass(frozen=True)
class MicrobatchPlanner:
    """Plan and build microbatches without communication: every rank computes the same plan."""

    config: BatchConfig

    def make_microbatches(
        self, lengths: Sequence[int], sample_at: Callable[[int], Sample], patches: Sequence[int] = ()
    ) -> list[Microbatch]:
        """Plan and build this rank's microbatches of a batch.

        Args:
            lengths: tokens of each row of the batch.
            sample_at: returns the sample at a position of the batch; called for this rank's positions only.
            patches: of the images of each row; empty where no row has any.

        Raises:
            ValueError: the rows can't be divided over the ranks; see ``packing.plan_microbatches``.
        """
        return self.build(self.plan(lengths, patches), sample_at)

    def plan(self, lengths: Sequence[int], patches: Sequence[int] = ()) -> list[Bin]:
        """Return the positions that each microbatch of this rank holds, in order.

        Raises:
            ValueError: the rows can't be divided over the ranks; see ``packing.plan_microbatches``.
        """
        return plan_microbatches(lengths, self.config, patches)[self.config.dp_rank]

    def build(self, bins: Sequence[Bin], sample_at: Callable[[int], Sample]) -> list[Microbatch]:
        """Build the microbatches that hold these positions of a batch, with pixels where this rank's model reads them.

        Raises:
            UserError: an image cannot be read, or is not the one that was tokenized.
        """
        config = self.config
        whole = [
            collate(
                [sample_at(position) for position in bin_],
                pad_multiple=config.pad_multiple,
                total_multiple=config.total_multiple,
                pad_token_id=config.pad_token_id,
                images=config.images,
            )
            for bin_ in bins
        ]
        if config.equal_lengths:
            longest = max(microbatch.total_length for microbatch in whole)
            whole = [pad_to(microbatch, longest, config.pad_token_id) for microbatch in whole]
        if config.images is not None and config.needs_pixels:
            whole = [add_pixels(microbatch, config.images) for microbatch in whole]
        return [shard_context_parallel(microbatch, config.cp_rank, config.cp_size) for microbatch in whole]

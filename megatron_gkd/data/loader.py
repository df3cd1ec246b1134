"""The microbatches of each step, for one data-parallel and context-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_gkd.data.microbatch import Microbatch, collate, lengthen, padded_length, shard_context_parallel
from megatron_gkd.data.order import FILLER, SequentialOrder
from megatron_gkd.data.packing import plan_microbatches
from megatron_gkd.data.sample import FROM_DATASET, IGNORE, Sample


class SampleDataset(Protocol):
    """What the loader needs of a dataset; `TokenizedDataset` is one."""

    lengths: np.ndarray  # tokens of each sample
    num_labels: np.ndarray  # labels of each sample that are not -100

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class StepOrder(Protocol):
    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]: ...


class StepLoader:
    """Yields, step after step, the microbatches of this rank. Nothing is communicated: every rank computes the plan.

    Args:
        dataset: where samples come from.
        order: which rows a step has.
        global_batch_size: rows of a step over all ranks, packed or not.
        micro_batch_size: rows of a microbatch where `packing` is false.
        packing: fill microbatches up to `max_length` tokens with whole rows.
        max_length: tokens of a packed microbatch.
        dp_rank, dp_size: data-parallel rank and number of ranks.
        cp_rank, cp_size: context-parallel rank and number of ranks.
        pad_multiple: each sequence is padded to a multiple of this.
        microbatch_multiple: the number of microbatches of a rank is a multiple of this.
        equal_lengths: lengthen a rank's microbatches of a step to the longest of them, with padding.
        pad_token_id: id of padding.
        num_workers: processes that prepare steps ahead; 0 prepares them in this one.
        start_step: first step, counted from 0.
        num_steps: number of steps to yield.
    """

    def __init__(
        self,
        dataset: SampleDataset,
        order: StepOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        packing: bool,
        max_length: int,
        dp_rank: int,
        dp_size: int,
        cp_rank: int,
        cp_size: int,
        pad_multiple: int,
        pad_token_id: int,
        microbatch_multiple: int = 1,
        equal_lengths: bool = False,
        num_workers: int = 0,
        start_step: int = 0,
        num_steps: int,
    ) -> None:
        self._dataset, self._order = dataset, order
        self._global_batch_size = global_batch_size
        self._plan = dict(
            micro_batch_size=micro_batch_size,
            packing=packing,
            max_length=max_length,
            dp_size=dp_size,
            multiple_of=microbatch_multiple,
        )
        self._dp_rank = dp_rank
        self._cp = (cp_rank, cp_size)
        self._padding = dict(pad_multiple=pad_multiple, pad_token_id=pad_token_id)
        self._equal_lengths = equal_lengths
        self._num_workers = num_workers
        self._start_step, self._num_steps = start_step, num_steps

    def __len__(self) -> int:
        return self._num_steps

    def __iter__(self) -> Iterator[list[Microbatch]]:
        steps = _Steps(self, self._start_step, self._num_steps)
        # Its own generator: drawing the workers' seeds would otherwise move the global one, which dropout draws from.
        generator = torch.Generator()
        return iter(
            DataLoader(steps, batch_size=None, collate_fn=_as_is, num_workers=self._num_workers, generator=generator)
        )

    def step(self, step: int) -> list[Microbatch]:
        """The microbatches of this rank at a step, counted from 0."""
        rows = self._order.rows_of_step(step, self._global_batch_size)
        multiple = self._padding["pad_multiple"]
        lengths = [padded_length(self._length(row), multiple) for row in rows]
        plan = plan_microbatches(lengths, **self._plan)[self._dp_rank]
        whole = [self._microbatch([rows[position] for position in positions]) for positions in plan]
        if self._equal_lengths:
            longest = max(microbatch.total_length for microbatch in whole)
            whole = [lengthen(microbatch, longest, self._padding["pad_token_id"]) for microbatch in whole]
        return [shard_context_parallel(microbatch, *self._cp) for microbatch in whole]

    def num_tokens(self, step: int) -> int:
        """Labels that are not -100 in the whole global batch of a step, over all ranks: what its loss is divided by."""
        rows = self._order.rows_of_step(step, self._global_batch_size)
        return sum(int(self._dataset.num_labels[row]) for row in rows if row != FILLER)

    def _length(self, row: int) -> int:
        return 1 if row == FILLER else int(self._dataset.lengths[row])

    def _microbatch(self, rows: list[int]) -> Microbatch:
        filler = Sample(np.array([self._padding["pad_token_id"]]), np.array([IGNORE]), FROM_DATASET, FILLER)
        samples = [filler if row == FILLER else self._dataset[row] for row in rows]
        return collate(samples, **self._padding)


def validation_batches(
    dataset: SampleDataset, *, global_batch_size: int, num_steps: int | None = None, **layout: Any
) -> StepLoader:
    """A loader over a validation split: every row once, in order.

    The last global batch is filled up with rows of one token and no label, so that every rank has equal work and no row
    counts twice. `num_steps` stops earlier; the other arguments are those of `StepLoader`.
    """
    order = SequentialOrder(len(dataset))
    steps = order.num_steps(global_batch_size)
    steps = steps if num_steps is None else min(steps, num_steps)
    return StepLoader(dataset, order, global_batch_size=global_batch_size, num_steps=steps, **layout)


class _Steps(Dataset):
    """Steps as items of a map-style dataset, so that DataLoader's workers keep them in order."""

    def __init__(self, loader: StepLoader, start: int, count: int) -> None:
        self._loader, self._start, self._count = loader, start, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> list[Microbatch]:
        return self._loader.step(self._start + index)


def _as_is(microbatches: list[Microbatch]) -> list[Microbatch]:
    return microbatches

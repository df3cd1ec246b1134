"""The rows of each step: a pure function of the seed and the step, the same for every layout."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


class SampleOrder:
    """An endless sequence of rows, epoch after epoch, over several concatenated datasets.

    An epoch has `weight` passes over each dataset: 1.0 is one pass, 2.0 two, 0.5 a random half, which each epoch draws
    anew. With `shuffle` all rows of an epoch are permuted together; without, they come in the order of the datasets.
    Only the latest epoch is held in memory.

    Args:
        sizes: rows of each dataset; row i of dataset d has index `sum(sizes[:d]) + i`.
        weights: passes over each dataset in an epoch, > 0.
        seed: non-negative.
        shuffle: whether to permute.

    Raises:
        ValueError: the lists differ in length, a weight is not positive, or an epoch would be empty.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> None:
        if len(sizes) != len(weights):
            raise ValueError(f"{len(sizes)} sizes but {len(weights)} weights")
        if any(weight <= 0 for weight in weights):
            raise ValueError(f"weights must be positive, not {list(weights)}")
        self._sizes, self._weights = list(sizes), list(weights)
        self._seed, self._shuffle = seed, shuffle
        self._cached: tuple[int, np.ndarray] | None = None
        self.epoch_length = sum(sum(self._passes(dataset)) for dataset in range(len(sizes)))
        if self.epoch_length == 0:
            raise ValueError(f"no rows: sizes {list(sizes)}, weights {list(weights)}")

    def __getitem__(self, position: int) -> int:
        """Return the row at a position of the endless sequence, counted from 0."""
        epoch, offset = divmod(position, self.epoch_length)
        return int(self.epoch(epoch)[offset])

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the rows of step `step`, counted from 1. A global batch may reach over the end of an epoch."""
        start = (step - 1) * global_batch_size
        return [self[position] for position in range(start, start + global_batch_size)]

    def _passes(self, dataset: int) -> tuple[int, int]:
        """Return the rows that an epoch takes from a dataset in whole passes, and in the last, partial pass."""
        size, weight = self._sizes[dataset], self._weights[dataset]
        whole = math.floor(weight)
        return whole * size, round((weight - whole) * size)

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of an epoch, counted from 0: int64 [epoch_length]."""
        if self._cached is None or self._cached[0] != number:
            self._cached = (number, self._draw(number))
        return self._cached[1]

    def _draw(self, epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64([self._seed, epoch]))
        parts, first = [], 0
        for dataset, size in enumerate(self._sizes):
            from_whole, from_partial = self._passes(dataset)
            parts.append(first + np.arange(from_whole) % max(size, 1))
            if from_partial:
                parts.append(first + np.sort(random.permutation(size)[:from_partial]))
            first += size
        rows = np.concatenate(parts)
        return random.permutation(rows) if self._shuffle else rows


PADDING_ROW = -1  # the place of a row without labels, which pads the last global batch


class SequentialOrder:
    """Every row once, in order; the last global batch is padded with `PADDING_ROW`."""

    def __init__(self, size: int) -> None:
        self._size = size

    def num_steps(self, global_batch_size: int) -> int:
        """Return the number of steps that hold all rows."""
        return math.ceil(self._size / global_batch_size)

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the rows of step `step`, counted from 1."""
        start = (step - 1) * global_batch_size
        return [row if row < self._size else PADDING_ROW for row in range(start, start + global_batch_size)]

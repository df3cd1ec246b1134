"""The order in which the rows of a step have about the same length."""

from __future__ import annotations

import numpy as np

from megatron_gkd.data.order import SampleOrder

BATCHES_PER_GROUP = 50  # global batches whose rows are sorted together; more would make epochs more alike
_STREAM = 0x6C656E  # keeps these draws apart from those of the rows, which start from the same seed


class LengthGroupedOrder:
    """An endless sequence of rows whose epochs hold the same rows as those of another order.

    The rows of an epoch are divided into groups in the other order, and each group is sorted by length and divided into
    global batches; the batches of the epoch come in random order. Rows of a step that reaches over the end of an epoch
    stay as they are in the other order.

    Args:
        order: a shuffled order.
        lengths: int64 [rows], tokens of each row.
        seed: non-negative.
        global_batch_size: rows of a step.

    Attributes:
        epoch_length: rows of an epoch.
    """

    def __init__(self, order: SampleOrder, lengths: np.ndarray, seed: int, global_batch_size: int) -> None:
        self._order, self._lengths, self._seed, self._batch = order, lengths, seed, global_batch_size
        self.epoch_length = order.epoch_length
        self._cached: tuple[int, np.ndarray] | None = None

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the rows of step `step`, counted from 1. A global batch may reach over the end of an epoch.

        Raises:
            ValueError: the rows are grouped for another size of the global batch.
        """
        if global_batch_size != self._batch:
            raise ValueError(f"rows are grouped for steps of {self._batch} rows, not {global_batch_size}")
        start = (step - 1) * global_batch_size
        return [self[position] for position in range(start, start + global_batch_size)]

    def __getitem__(self, position: int) -> int:
        """Return the row at a position of the endless sequence, counted from 0."""
        epoch, offset = divmod(position, self._order.epoch_length)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, self._group(epoch))
        return int(self._cached[1][offset])

    def _group(self, epoch: int) -> np.ndarray:
        rows = self._order.epoch(epoch).copy()
        first = -epoch * len(rows) % self._batch  # rows that complete the last step of the epoch before
        whole = max(0, len(rows) - first) // self._batch
        if whole:
            end = first + whole * self._batch
            rows[first:end] = self._sort(rows[first:end], epoch)
        return rows

    def _sort(self, rows: np.ndarray, epoch: int) -> np.ndarray:
        """Return the rows of whole steps in their order."""
        size = BATCHES_PER_GROUP * self._batch
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        rows = np.concatenate([group[np.argsort(-self._lengths[group], kind="stable")] for group in groups])
        random = np.random.Generator(np.random.PCG64([self._seed, _STREAM, epoch]))
        return random.permutation(rows.reshape(-1, self._batch)).reshape(-1)

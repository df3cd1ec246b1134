"""Loader of each step's microbatches for one data-parallel and context-parallel rank."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.microbatch_planner import MicrobatchPlanner
from megatron_gkd.data.order import PADDING_ROW, SequentialOrder
from megatron_gkd.data.sample import FROM_DATASET, IGNORED_LABEL, PAD_TOKEN_ID, Sample
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.signals import STOP_SIGNALS


class RowValues(Protocol):
    """A number for each row; an array is one."""

    def __getitem__(self, row: int, /) -> Any: ...


class IndexedSamples(Protocol):
    """Samples by the numbers of their rows; `StreamedRows`, which has no length, are such samples."""

    @property
    def lengths(self) -> RowValues:
        """Tokens of each sample."""
        ...

    @property
    def num_labels(self) -> RowValues:
        """Labels of each sample that are not -100."""
        ...

    @property
    def num_patches(self) -> RowValues:
        """Patches of each sample's images."""
        ...

    def __getitem__(self, index: int) -> Sample: ...


class SampleDataset(Protocol):
    """A dataset of samples with known lengths; `TokenizedDataset` is one."""

    lengths: np.ndarray  # tokens of each sample
    num_labels: np.ndarray  # labels of each sample that are not -100
    num_patches: np.ndarray  # patches of each sample's images

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


class StepOrder(Protocol):
    """The order in which steps train on the rows of a dataset."""

    def rows_of_step(self, step: int, global_batch_size: int) -> list[int]:
        """Return the rows of step `step`, counted from 1."""
        ...


class StepLoader:
    """Yield this rank's microbatches, step after step.

    Args:
        dataset: where samples come from.
        order: which rows a step has.
        config: how a step's rows become this rank's microbatches.
        steps: the steps to yield, counted from 1.
        num_workers: processes that prepare steps ahead; 0 prepares them in this one.
        skip: steps for which None is yielded: their microbatches are made elsewhere.
    """

    def __init__(
        self,
        dataset: IndexedSamples,
        order: StepOrder,
        config: BatchConfig,
        steps: range,
        *,
        num_workers: int = 0,
        skip: Callable[[int], bool] | None = None,
    ) -> None:
        self._dataset, self._order, self._config, self._steps = dataset, order, config, steps
        self._planner = MicrobatchPlanner(config)
        self._num_workers, self._skip = num_workers, skip

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[Microbatch] | None]:
        steps = _Steps(self, self._steps)
        # A generator of its own: the workers' seeds would otherwise be drawn from the global one, like dropout.
        generator = torch.Generator()
        loader = DataLoader(
            steps,
            batch_size=None,
            collate_fn=_as_is,
            num_workers=self._num_workers,
            generator=generator,
            worker_init_fn=_ignore_stop_signals,
            # Each worker is two steps ahead by default; pixels take too much memory for that.
            prefetch_factor=1 if self._num_workers and self._config.needs_pixels else None,
        )
        for item in _iterate_quietly(loader):
            if isinstance(item, UserError):
                raise item
            yield None if item is None else [Microbatch.from_arrays(arrays) for arrays in item]

    def step(self, step: int) -> list[Microbatch] | None:
        """Build this rank's microbatches of a step, counted from 1; None for a step that is skipped."""
        if self._skip is not None and self._skip(step):
            return None
        rows = self._order.rows_of_step(step, self._config.global_batch_size)
        require_responses(self._dataset, [row for row in rows if row != PADDING_ROW], step)
        lengths = [self._length(row) for row in rows]
        patches = [] if self._config.max_patches is None else [self._num_patches(row) for row in rows]
        return self._planner.make_microbatches(lengths, lambda position: self._sample(rows[position]), patches)

    def _length(self, row: int) -> int:
        return 1 if row == PADDING_ROW else int(self._dataset.lengths[row])

    def _num_patches(self, row: int) -> int:
        return 0 if row == PADDING_ROW else int(self._dataset.num_patches[row])

    def _sample(self, row: int) -> Sample:
        return padding_sample(self._config.pad_token_id) if row == PADDING_ROW else self._dataset[row]


def require_responses(dataset: IndexedSamples, rows: Sequence[int], step: int) -> None:
    """Check that no row is a prompt alone, in a step in which the student does not respond to it.

    Raises:
        UserError: a row is a prompt alone.
    """
    for row in rows:
        if dataset.num_labels[row] == 0:
            raise UserError(
                f"step {step}: row {row} of the dataset has no response, and in this step the student does not "
                "respond to it; add a response to the row, or set distill.lmbda = 1"
            )


def padding_sample(pad_token_id: int = PAD_TOKEN_ID) -> Sample:
    """Build a row of one token and no label."""
    return Sample(np.array([pad_token_id]), np.array([IGNORED_LABEL]), FROM_DATASET, PADDING_ROW)


def validation_batches(dataset: SampleDataset, config: BatchConfig, num_steps: int | None = None) -> StepLoader:
    """Build a loader over a validation split: every row once, in order.

    The last global batch is padded with rows of one token and no label, so that every rank has equal work and no row
    counts twice.

    Args:
        dataset: the validation split.
        config: how a step's rows become this rank's microbatches.
        num_steps: most steps; None for all rows.
    """
    order = SequentialOrder(len(dataset))
    steps = order.num_steps(config.global_batch_size)
    if num_steps is not None:
        steps = min(steps, num_steps)
    return StepLoader(dataset, order, config, range(1, steps + 1))


class _Steps(Dataset):
    """Steps as items of a map-style dataset, so that DataLoader's workers keep them in order.

    An item holds NumPy arrays, which go through a worker's pipe: each tensor would hold a file descriptor of shared
    memory open, and a step has hundreds of them.
    """

    def __init__(self, loader: StepLoader, steps: range) -> None:
        self._loader, self._steps = loader, steps

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> _Item:
        try:
            microbatches = self._loader.step(self._steps[index])
        except UserError as error:  # DataLoader would add a worker's traceback to the message
            return error
        return None if microbatches is None else [microbatch.to_arrays() for microbatch in microbatches]


_Item = list[dict[str, Any]] | UserError | None


def _iterate_quietly(loader: DataLoader) -> Iterator[_Item]:
    """Iterate without DataLoader's handler of SIGCHLD.

    It would raise the death of a worker wherever this rank is, such as in a collective, where no other rank can learn
    of it. Without it, the next item that is missing raises it.
    """
    before = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)
    return items


def _ignore_stop_signals(worker: int) -> None:
    """Leave these signals to the rank, which fails without its worker: Slurm sends them to all processes of a job."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _as_is(item: _Item) -> _Item:
    return item

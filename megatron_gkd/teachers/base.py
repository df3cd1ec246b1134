"""The protocol of teachers, and the signals that they give to the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, overload, runtime_checkable

from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import ServiceError
from megatron_gkd.models.host_rows import HostRows, Rows
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.topk import TopK


class TeacherFailed(ServiceError):
    """A teacher cannot score. All ranks raise it together, and the student is unchanged."""

    is_shared = True


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states for one microbatch, from which the loss computes logits chunk by chunk.

    Attributes:
        states: [N, H_T] after the final norm, one row for every label of the microbatch in order; sharded over the
            tensor-parallel ranks, or in host memory, until the loss needs them.
        head: the teacher's LM head, ceil(V/TP) rows over the same ids as the student's shard; shared by all
            microbatches.
    """

    states: Rows
    head: OutputHead


@dataclass(frozen=True)
class Part:
    """One teacher's signal for some labels of a microbatch.

    Attributes:
        rows: int64 [n], rising: which of the microbatch's N labels on this rank.
        signal: of n labels.
    """

    rows: Tensor
    signal: Hidden | TopK


@dataclass(frozen=True)
class Parts:
    """Several teachers' signals for one microbatch, at least one. Every label is in exactly one; one may have none."""

    parts: tuple[Part, ...]


TeacherSignal = Hidden | TopK | Parts
"""A `TopK` has [N, k] entries, one row for every label, the same on all tensor-parallel ranks. A row whose entries are
all missing or of probability zero has no signal: its label does not count."""


def select_parts(rows: Tensor, signal: TeacherSignal) -> tuple[Part, ...]:
    """Return a signal for the labels `rows`, int64 [n], as parts of a microbatch's signal."""
    if isinstance(signal, Parts):
        return tuple(Part(rows[part.rows], part.signal) for part in signal.parts)
    return (Part(rows, signal),)


def prefetch(signal: TeacherSignal | None) -> None:
    """Start to copy what a signal has in host memory to the device."""
    if isinstance(signal, Parts):
        for part in signal.parts:
            prefetch(part.signal)
    elif isinstance(signal, Hidden) and isinstance(signal.states, HostRows):
        signal.states.prefetch()


class ReadOnce(Sequence[TeacherSignal | None]):
    """Signals that are released as they are read, so that those of finished microbatches take no memory.

    Reading one prefetches the next.

    Args:
        signals: the caller must not keep them.
    """

    def __init__(self, signals: Sequence[TeacherSignal | None]) -> None:
        self._signals = list(signals)
        self._is_read = [False] * len(signals)

    def __len__(self) -> int:
        return len(self._signals)

    @overload
    def __getitem__(self, index: int) -> TeacherSignal | None: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[TeacherSignal | None]: ...

    def __getitem__(self, index: int | slice) -> TeacherSignal | Sequence[TeacherSignal | None] | None:
        if isinstance(index, slice):
            return [self[position] for position in range(len(self))[index]]
        if self._is_read[index]:
            raise ValueError(f"signal {index} has been read and released already")
        self._is_read[index] = True
        signal, self._signals[index] = self._signals[index], None
        if index + 1 < len(self._signals):
            prefetch(self._signals[index + 1])
        return signal


class TeacherSource(Protocol):
    """A teacher: `with teacher.resident(): signals = teacher.score(microbatches)`."""

    def resident(self) -> AbstractContextManager[None]:
        """Keep what scoring needs in place inside the context, such as weights on the device."""
        ...

    def score(self, microbatches: Sequence[Microbatch]) -> Sequence[TeacherSignal | None]:
        """Return one signal for each microbatch on the last pipeline stage, None elsewhere. All ranks call it together.

        Raises:
            GkdError: in all ranks together; TeacherFailed where no mistake of the user is the reason.
        """
        ...


@runtime_checkable
class FollowsStudent(Protocol):
    """A teacher that changes with the student."""

    def after_update(self) -> None:
        """Follow a change of the student's weights, after every optimizer step. All ranks call it together."""
        ...


@runtime_checkable
class ScoresAhead(Protocol):
    """A teacher that computes elsewhere, while the student trains or samples."""

    def begin(self, samples: Iterable[Sample]) -> None:
        """Start to score samples of later microbatches. Returns at once; ranks need not call it together."""
        ...

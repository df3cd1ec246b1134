"""What a teacher is to the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import ServiceError
from megatron_gkd.models.sharded_rows import ShardedRows
from megatron_gkd.ops.topk import TopK


class TeacherFailed(ServiceError):
    """No signals are to be had. All ranks raise it together, and the student is as it was before."""

    is_shared = True


@dataclass(frozen=True)
class Hidden:
    """A teacher's last hidden states for one microbatch, from which the loss makes logits chunk by chunk."""

    states: ShardedRows
    """[N, H_T] after the final norm, one row for every label of the microbatch (in order). They wait for the loss in
    shards, one for each tensor-parallel rank."""
    head_weight: Tensor
    """[ceil(V/TP), H_T]: the teacher's LM head over the same ids as the student's shard; shared by all microbatches."""


@dataclass(frozen=True)
class Part:
    """What one teacher says to some labels of a microbatch."""

    rows: Tensor
    """int64 [n], rising: which of the microbatch's N labels on this rank."""
    signal: Hidden | TopK
    """Of n labels."""


@dataclass(frozen=True)
class Parts:
    """Several teachers' signals for one microbatch, at least one. Every label is in exactly one; one may have none."""

    parts: tuple[Part, ...]


TeacherSignal = Hidden | TopK | Parts
"""A `TopK` has [N, k] entries, one row for every label, the same on all tensor-parallel ranks. A row whose entries are
all missing or of probability zero says nothing: its label does not count."""


class ReadOnce(Sequence):
    """Signals of which each is released as it is read, so that those of finished microbatches take no memory.

    Args:
        signals: emptied in the course of it.
    """

    def __init__(self, signals: list[TeacherSignal | None]):
        self._signals = signals
        self._is_read = [False] * len(signals)

    def __len__(self) -> int:
        return len(self._signals)

    def __getitem__(self, index: int) -> TeacherSignal | None:
        if self._is_read[index]:
            raise ValueError(f"signal {index} has been read and released already")
        self._is_read[index] = True
        signal, self._signals[index] = self._signals[index], None
        return signal


class TeacherSource(Protocol):
    """`with teacher.resident(): signals = teacher.score(microbatches)`."""

    def resident(self) -> AbstractContextManager[None]:
        """What scoring needs is in place inside (weights on the device, a server reachable)."""
        ...

    def score(self, microbatches: Sequence[Microbatch]) -> list[TeacherSignal | None]:
        """One signal a microbatch on the last pipeline stage, None elsewhere. All ranks call it together.

        Raises:
            TeacherFailed: in all ranks together.
        """
        ...


@runtime_checkable
class FollowsStudent(Protocol):
    """A teacher that changes with the student."""

    def after_update(self) -> None:
        """The student's weights have just changed: once after every optimizer step. All ranks call it together."""
        ...


@runtime_checkable
class ScoresAhead(Protocol):
    """A teacher that works elsewhere, while the student trains or samples."""

    def begin(self, samples: Iterable[Sample]) -> None:
        """These will be in a microbatch to score soon. Returns at once; each rank calls it when it likes, or not."""
        ...

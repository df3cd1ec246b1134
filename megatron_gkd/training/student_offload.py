"""Give the student's device memory to the rollout engine while that samples."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_gkd.models.storage_offload import StorageOffload
from megatron_gkd.training.optimizer_state import state_tensors
from megatron_gkd.training.student import Student


@dataclass(frozen=True)
class OffloadOptions:
    """What leaves the device. With either, the gradient buffers do too: nothing reads them across a rollout.

    Attributes:
        model: the weights, trained or not.
        optimizer: Adam's moments and the optimizer's copy of the weights.
    """

    model: bool = False
    optimizer: bool = False

    @property
    def is_any(self) -> bool:
        """Whether anything leaves."""
        return self.model or self.optimizer


class StudentOffload:
    """Keep parts of the student in page-locked host memory while `away()`; all have the same bits afterwards.

    Args:
        student: the model in training.
        options: what leaves.

    Attributes:
        freed_bytes: device memory that the newest `away()` freed on this rank.
    """

    def __init__(self, student: Student, options: OffloadOptions) -> None:
        self._student, self._options = student, options
        self._storages = StorageOffload()
        self.freed_bytes = 0

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Free the device memory inside, where the student must not be used. The gradients are zero afterwards."""
        if not self._options.is_any:
            yield
            return
        student = self._student
        student.gather_parameters()  # it would write into freed memory
        student.optimizer.zero_grad()  # copies of gradients in another type
        model, optimizer = list(_weights(student)), list(state_tensors(student.optimizer))
        of_model = {tensor.untyped_storage()._cdata for tensor in model}
        kept = model if self._options.model else []
        if self._options.optimizer:  # fp32 weights are their own copy
            kept = kept + [one for one in optimizer if one.untyped_storage()._cdata not in of_model]
        with torch.no_grad(), self._storages.away(kept, _gradient_buffers(student)) as self.freed_bytes:
            yield


def _weights(student: Student) -> Iterator[Tensor]:
    for chunk in student.chunks:
        yield from (parameter.data for parameter in chunk.parameters())
        yield from (buffer.param_data for buffer in _buffers(chunk) if buffer.param_data is not None)


def _gradient_buffers(student: Student) -> Iterator[Tensor]:
    return (buffer.grad_data for chunk in student.chunks for buffer in _buffers(chunk))


def _buffers(chunk: Any) -> list[Any]:
    """Return the buffers of a DDP-wrapped chunk, in which its parameters and gradients are contiguous."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]

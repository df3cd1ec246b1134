"""The weights that the student's modules compute with while the student is its own teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_gkd.models.host_memory import HostTensors
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.runtime import portability


class TeacherWeights(Protocol):
    """Weights of a teacher that uses the student's modules."""

    @property
    def head(self) -> OutputHead | None:
        """The LM head without gradient: that of the newest `active()` context; None before the last stage."""
        ...

    def active(self) -> contextlib.AbstractContextManager[None]:
        """Let the modules compute with these weights inside the context, and with the student's exact ones after it."""
        ...

    def after_update(self) -> None:
        """Follow an optimizer step of the student."""
        ...


class CurrentWeights:
    """The student's current weights."""

    def __init__(self, model: MegatronModel) -> None:
        self._model = model

    @property
    def head(self) -> OutputHead | None:
        """See ``TeacherWeights.head``."""
        head = self._model.head
        return None if head is None else head.detach()

    def active(self) -> contextlib.AbstractContextManager[None]:
        """See ``TeacherWeights.active``."""
        return contextlib.nullcontext()

    def after_update(self) -> None:
        """Do nothing: these weights do not follow the student."""


class BaseWeights(CurrentWeights):
    """The base model without the student's adapters, which is what a student with new adapters begins as."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        """See ``TeacherWeights.active``."""
        return self._model.adapters_disabled()


class InitialWeights:
    """The trainable weights and buffers that the student had when this was created (with adapters, those alone).

    They are in page-locked host memory and are swapped with the student's, so that the device has one model at a time.
    The device has both heads' shards, since the loss needs them.

    Args:
        model: the student's.
        dtype: of the copy in host memory; None: the parameters' own.
    """

    def __init__(self, model: MegatronModel, dtype: torch.dtype | None = None) -> None:
        self._tensors = {
            f"{index}.{name}": tensor
            for index, chunk in enumerate(model.chunks)
            for name, tensor in _changing_tensors(chunk)
        }
        self._teacher_memory = HostTensors(self._tensors, dtype)
        self._student_memory = HostTensors(self._tensors)
        self._head = model.head
        self._teacher_head = None if self._head is None else self._head.clone()
        self._store(self._teacher_memory)
        portability.synchronize()

    @property
    def head(self) -> OutputHead | None:
        """See ``TeacherWeights.head``."""
        return self._teacher_head

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """See ``TeacherWeights.active``."""
        # All copies are in the order of the device's one stream; the host reads none of them.
        self._store(self._student_memory)
        try:
            self._load(self._teacher_memory)
            if self._head is not None and self._teacher_head is not None:
                self._teacher_head.copy_(self._head)
            yield
        finally:
            self._load(self._student_memory)

    def after_update(self) -> None:
        """Do nothing: these weights do not follow the student."""

    def _store(self, memory: HostTensors) -> None:
        for name, tensor in self._tensors.items():
            memory.write(name, tensor.data)

    def _load(self, memory: HostTensors) -> None:
        for name, tensor in self._tensors.items():
            tensor.data.copy_(memory.read(name, tensor.device))


class AverageWeights(InitialWeights):
    """Exponential moving average of the weights, in fp32: after every step, decay · average + (1 - decay) · weights.

    Args:
        model: the student's.
        decay: in [0, 1].
        finish_gather: finishes a parameter gather in progress (``Student.gather_parameters``).
    """

    def __init__(self, model: MegatronModel, decay: float, finish_gather: Callable[[], None]) -> None:
        super().__init__(model, torch.float32)
        self.decay, self._finish_gather = decay, finish_gather

    @torch.no_grad()
    def after_update(self) -> None:
        """See ``TeacherWeights.after_update``."""
        self._finish_gather()
        for name, tensor in self._tensors.items():
            average = self._teacher_memory.read(name, tensor.device)
            average.lerp_(tensor.data.float(), 1 - self.decay)
            self._teacher_memory.write(name, average)

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """Return this rank's share of the average by parameter: fp32 on the host, a copy."""
        portability.synchronize()
        return {
            parameter: self._teacher_memory.read(name, torch.device("cpu"))
            for name, parameter in self._tensors.items()
            if isinstance(parameter, nn.Parameter)
        }

    def replace(self, tensors: Mapping[nn.Parameter, Tensor]) -> None:
        """Replace the average by what `by_parameter` returned."""
        portability.synchronize()
        for name, parameter in self._tensors.items():
            if isinstance(parameter, nn.Parameter):
                self._teacher_memory.write(name, tensors[parameter])


def _changing_tensors(chunk: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield what training may change: trainable parameters, and the buffers in checkpoints, such as experts' biases."""
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    for prefix, module in chunk.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}", buffer

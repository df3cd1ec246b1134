"""Which weights the student's modules compute with while the student is its own teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from megatron_gkd.models.host_memory import HostTensors
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime import portability


class WeightsOf(Protocol):
    """The student's modules as the teacher's."""

    @property
    def head_weight(self) -> Tensor | None:
        """[ceil(V/TP), H], without gradient: as it is in `active()`, and until the next; None before the last stage."""
        ...

    def active(self) -> contextlib.AbstractContextManager[None]:
        """The modules compute with these weights inside, and with the student's own again afterwards, bit by bit."""
        ...

    def after_update(self) -> None:
        """The student has taken an optimizer step."""
        ...


class CurrentWeights:
    """Those that the student has."""

    def __init__(self, model: MegatronModel):
        self._model = model

    @property
    def head_weight(self) -> Tensor | None:
        head = self._model.head_weight
        return None if head is None else head.detach()

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def after_update(self) -> None:
        """Nothing to do."""


class BaseWeights(CurrentWeights):
    """Those of the base model, under the student's adapters: what a student with new adapters begins as."""

    def active(self) -> contextlib.AbstractContextManager[None]:
        return self._model.adapters_disabled()


class InitialWeights:
    """Those that the student had when this was made; of a student with adapters, these alone.

    They lie in page-locked host memory, of `dtype` (None: the parameters' own), and change places with the student's,
    so that the device holds one model at a time. The head's shard is there twice, since the loss needs both.
    """

    def __init__(self, model: MegatronModel, dtype: torch.dtype | None = None):
        self._parameters = {
            f"{index}.{name}": parameter
            for index, chunk in enumerate(model.chunks)
            for name, parameter in chunk.named_parameters()
            if parameter.requires_grad
        }
        self._held = HostTensors(self._parameters, dtype)
        self._outside = HostTensors(self._parameters)
        self._head = model.head_weight
        self.head_weight = None if self._head is None else self._head.detach().clone()
        self._store(self._held)
        portability.synchronize()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        # All copies are in the order of the device's one stream; the host reads none of them.
        self._store(self._outside)
        try:
            self._load(self._held)
            if self._head is not None:
                self.head_weight.copy_(self._head.data)
            yield
        finally:
            self._load(self._outside)

    def after_update(self) -> None:
        """Nothing to do."""

    def _store(self, memory: HostTensors) -> None:
        for name, parameter in self._parameters.items():
            memory.write(name, parameter.data)

    def _load(self, memory: HostTensors) -> None:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(memory.read(name, parameter.device))


class AverageWeights(InitialWeights):
    """Their exponential moving average, in fp32: after every step, decay · average + (1 - decay) · weights.

    `complete`: finishes a parameter gather that is under way (``Student.gather_parameters``).
    """

    def __init__(self, model: MegatronModel, decay: float, complete: Callable[[], None]):
        super().__init__(model, torch.float32)
        self.decay, self._complete = decay, complete

    @torch.no_grad()
    def after_update(self) -> None:
        self._complete()
        for name, parameter in self._parameters.items():
            average = self._held.read(name, parameter.device)
            average.lerp_(parameter.data.float(), 1 - self.decay)
            self._held.write(name, average)

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """Return this rank's share of the average by parameter: fp32 on the host, a copy."""
        portability.synchronize()
        return {parameter: self._held.read(name, torch.device("cpu")) for name, parameter in self._parameters.items()}

    def replace(self, tensors: Mapping[nn.Parameter, Tensor]) -> None:
        """Take over what `by_parameter` returned."""
        portability.synchronize()
        for name, parameter in self._parameters.items():
            self._held.write(name, tensors[parameter])

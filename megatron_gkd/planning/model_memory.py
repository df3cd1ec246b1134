"""Read the memory of a built model, its gradients and its optimizer off their tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.training.optimizer_state import adams
from megatron_gkd.training.student import Student


def count_bytes(tensors: Iterable[Tensor], beside: Iterable[Tensor] = ()) -> int:
    """Return the bytes of the tensors' storages, each once, on the device, without those of other tensors."""
    known = {tensor.untyped_storage()._cdata for tensor in beside}
    sizes = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors if tensor.is_meta}
    return sum(size for key, size in sizes.items() if key not in known)


def model_tensors(model: MegatronModel) -> list[Tensor]:
    """Return the parameters and buffers of all chunks."""
    return [tensor for chunk in model.chunks for tensor in (*chunk.parameters(), *chunk.buffers())]


def parameters_of(model: MegatronModel) -> list[nn.Parameter]:
    """Return the parameters of all chunks, each once."""
    return list(dict.fromkeys(parameter for chunk in model.chunks for parameter in chunk.parameters()))


def gradient_buffers(student: Student) -> list[Tensor]:
    """Return the buffers in which gradients are summed up."""
    return [buffer.grad_data for chunk in student.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def optimizer_tensors(student: Student) -> tuple[list[Tensor], list[Tensor]]:
    """Return what the optimizer holds after a step: tensors on the device, and those in host memory."""
    on_device: list[Tensor] = []
    on_host: list[Tensor] = []
    for adam in adams(student.optimizer):
        hosted = getattr(adam, "cpu_optimizers", None)
        if hosted is None:
            on_device += _held(adam)
            continue
        gradients = list(adam.cpu_copy_map_grad.values())
        on_host += [*(tensor for one in hosted for tensor in _held(one)), *gradients]
        on_device += [] if adam.gpu_optimizer is None else _held(adam.gpu_optimizer)
    return on_device, on_host


def _held(adam: Any) -> Iterator[Tensor]:
    """Yield the parameters of an Adam, which are its own copies or views of the model's, and its state."""
    for group in adam.param_groups:
        for parameter in group["params"]:
            yield parameter.data
            for value in adam.state.get(parameter, {}).values():
                if torch.is_tensor(value):
                    yield getattr(value, "_data", value)

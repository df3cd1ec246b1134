"""The copies of a student that teaches itself: exact, and in allocations that rounding does not enlarge."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from allocations import Allocations
from torch import nn

from megatron_gkd.models import host_memory
from megatron_gkd.models.host_memory import SMALLEST_PIECE
from megatron_gkd.ops.output_head import OutputHead


@pytest.fixture(scope="module")
def self_weights():
    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.teachers import self_weights

    return self_weights


def student(dtype: torch.dtype):
    torch.manual_seed(0)
    chunks = [nn.Sequential(nn.Linear(300, 70, dtype=dtype), nn.LayerNorm(70)), nn.Linear(70, 90, dtype=dtype)]
    return SimpleNamespace(chunks=chunks, head=OutputHead(chunks[1].weight, chunks[1].bias))


def parameters(model) -> list[nn.Parameter]:
    return [parameter for chunk in model.chunks for parameter in chunk.parameters()]


def randomize(model) -> list[torch.Tensor]:
    for parameter in parameters(model):
        parameter.data.normal_()
    return [parameter.detach().clone() for parameter in parameters(model)]


def equal(model, expected) -> bool:
    return all(torch.equal(*pair) for pair in zip(parameters(model), expected, strict=True))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    defaults = (1 << 14,)
    monkeypatch.setattr(host_memory.HostMemory.__init__, "__defaults__", defaults)
    monkeypatch.setattr(host_memory.HostTensors.__init__, "__defaults__", (None, *defaults))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_initial_weights_are_swapped_with_the_students(self_weights, dtype, monkeypatch):
    model = student(dtype)
    initial = [parameter.detach().clone() for parameter in parameters(model)]
    num_bytes = sum(parameter.nbytes for parameter in initial)
    allocations = Allocations(monkeypatch, parameters(model))
    with allocations:
        weights = self_weights.InitialWeights(model)
    assert set(allocations.pinned) <= {1 << bit for bit in range(15)}
    assert 2 * num_bytes <= sum(allocations.pinned) < 2 * (num_bytes + SMALLEST_PIECE)
    head, largest = model.head.weight.nbytes + model.head.bias.nbytes, max(parameter.nbytes for parameter in initial)
    assert allocations.peak <= num_bytes + head + largest
    trained = randomize(model)
    for _ in range(2):
        with allocations, weights.active():
            assert equal(model, initial)
            assert torch.equal(weights.head.weight, initial[-2]) and torch.equal(weights.head.bias, initial[-1])
        assert equal(model, trained)
        trained = randomize(model)
    assert allocations.peak <= num_bytes + head + largest


def test_the_average_is_kept_in_fp32(self_weights):
    model = student(torch.bfloat16)
    average = [parameter.detach().float().clone() for parameter in parameters(model)]
    weights = self_weights.AverageWeights(model, decay=0.75, finish_gather=lambda: None)
    for _ in range(3):
        trained = randomize(model)
        weights.after_update()
        average = [old.lerp(new.float(), 0.25) for old, new in zip(average, trained, strict=True)]
    held = weights.by_parameter()
    assert all(torch.equal(held[p], value) for p, value in zip(parameters(model), average, strict=True))
    with weights.active():
        assert equal(model, [value.to(p.dtype) for value, p in zip(average, parameters(model), strict=True)])
    assert equal(model, trained)
    later = student(torch.bfloat16)
    other = self_weights.AverageWeights(later, decay=0.75, finish_gather=lambda: None)
    other.replace(dict(zip(parameters(later), average, strict=True)))
    held = other.by_parameter()
    assert all(torch.equal(held[p], value) for p, value in zip(parameters(later), average, strict=True))


def test_buffers_of_checkpoints_are_swapped_and_averaged_like_parameters(self_weights):
    """Training moves the biases of some experts, which are no parameters."""
    model = student(torch.bfloat16)
    layer = model.chunks[0][0]
    layer.register_buffer("bias_of_experts", torch.tensor([1.0, 3.0]))
    layer.register_buffer("counts", torch.tensor([5]))
    layer.register_buffer("derived", torch.tensor([7.0]), persistent=False)
    initial = self_weights.InitialWeights(model)
    average = self_weights.AverageWeights(model, decay=0.75, finish_gather=lambda: None)
    layer.bias_of_experts.copy_(torch.tensor([2.0, 7.0]))
    for buffer in (layer.counts, layer.derived):
        buffer.add_(1)
    average.after_update()
    for weights, expected in ((initial, [1.0, 3.0]), (average, [1.25, 4.0])):
        with weights.active():
            assert layer.bias_of_experts.tolist() == expected
            assert (layer.counts.item(), layer.derived.item()) == (6, 8)
        assert layer.bias_of_experts.tolist() == [2.0, 7.0]
    assert set(average.by_parameter()) == set(parameters(model))

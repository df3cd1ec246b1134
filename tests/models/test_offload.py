"""Offloaded weights are restored bit by bit, and offloading needs no memory beside them."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations
from torch import nn

from megatron_gkd.models.offload import OffloadedWeights


@pytest.fixture(scope="module", autouse=True)
def portable():
    import megatron_gkd.runtime.preload  # noqa: F401


def module() -> nn.Module:
    torch.manual_seed(0)
    tied = nn.Linear(3, 5)
    model = nn.Sequential(nn.Linear(5, 3), tied, nn.LayerNorm(5, dtype=torch.bfloat16))
    model.register_parameter("again", tied.weight)
    return model


def parameters_of_all_kinds() -> dict[str, nn.Parameter]:
    """Several dtypes, NaN and infinities, strides, tied elements, a scalar, nothing, and odd sizes."""
    torch.manual_seed(1)
    storage = torch.randn(40, 13)
    tensors = {
        "fp32": torch.tensor([1.0, torch.nan, -torch.inf, -0.0, 1e-42]),
        "bf16": torch.randn(7, 5).bfloat16(),
        "fp16": torch.randn(300).half(),
        "fp64": torch.randn(3, dtype=torch.float64),
        "fp8": torch.randn(33).to(torch.float8_e4m3fn),
        "bytes": torch.randint(0, 255, (19,), dtype=torch.uint8),
        "transposed": torch.randn(6, 9).t(),
        "strided": torch.randn(8, 10)[::2, 1::3],
        "view": storage[3:5],
        "the same view": storage[3:5],
        "an overlapping view": storage[4:7],
        "scalar": torch.tensor(2.5),
        "nothing": torch.empty(0, 4),
        "large": torch.randn(1000, 3),
    }
    return {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in tensors.items()}


def device_bytes(parameters) -> int:
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters}
    return sum(storages.values())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def test_weights_need_memory_only_while_resident_and_do_not_change(monkeypatch):
    model = module()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    allocations = Allocations(monkeypatch)
    offloaded = OffloadedWeights(model.parameters())
    built = len(allocations.pinned)
    assert device_bytes(model.parameters()) == 0
    for _ in range(3):
        with offloaded.resident():
            assert device_bytes(model.parameters()) == offloaded.num_bytes
            assert 0 <= offloaded.num_bytes - sum(t.nbytes for t in before.values()) < 16 * len(before)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]), name
            assert model[0](torch.ones(2, 5)).isfinite().all()
        assert device_bytes(model.parameters()) == 0
    assert len(allocations.pinned) == built  # the host memory is allocated once


@pytest.mark.parametrize("largest_piece", [16, 64, 1024, 1 << 30])
def test_every_kind_of_parameter_is_restored_bit_by_bit(largest_piece):
    parameters = parameters_of_all_kinds()
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    offloaded = OffloadedWeights([*parameters.values(), parameters["bf16"]], largest_piece)
    assert device_bytes(parameters.values()) == 0
    for _ in range(2):
        with offloaded.resident():
            for name, parameter in parameters.items():
                assert parameter.shape == before[name].shape and parameter.dtype == before[name].dtype
                assert parameter.data_ptr() % 16 == 0
                assert same_bits(parameter, before[name]), name
            assert parameters["view"].data_ptr() == parameters["the same view"].data_ptr()
            assert device_bytes(parameters.values()) == offloaded.num_bytes
        assert device_bytes(parameters.values()) == 0


def test_a_model_without_parameters_can_be_offloaded():
    offloaded = OffloadedWeights([])
    with offloaded.resident():
        assert offloaded.num_bytes == 0


@pytest.mark.parametrize("rows", [[40] * 30, [1, 999, 7, 7, 500, 64], [5000], [3, 4097, 2]])
def test_building_holds_the_weights_and_one_more_parameter_at_most(rows, monkeypatch):
    parameters = [nn.Parameter(torch.randn(n, 8).t()) for n in rows]  # not contiguous: each is copied once
    total = sum(parameter.nbytes for parameter in parameters)
    largest = max(parameter.nbytes for parameter in parameters)
    allocations = Allocations(monkeypatch, parameters)
    with allocations:
        offloaded = OffloadedWeights(parameters, largest_piece=1 << 14)
        assert allocations.live() == 0
        assert allocations.peak <= total + largest + 16
        with offloaded.resident():
            torch.zeros(0)
            assert allocations.live() == offloaded.num_bytes
    assert allocations.peak <= total + largest + 16


def test_contiguous_parameters_are_moved_without_a_copy_on_the_device(monkeypatch):
    parameters = [nn.Parameter(torch.randn(n, 8)) for n in (100, 300, 2, 100)]
    with Allocations(monkeypatch, parameters) as allocations:
        OffloadedWeights(parameters, largest_piece=1 << 12)
    assert allocations.peak == sum(parameter.nbytes for parameter in [torch.empty(502, 8)])


def test_damaged_weights_are_found():
    offloaded = OffloadedWeights(module().parameters())
    next(offloaded._host.parts(3, 1)).add_(1)
    with pytest.raises(RuntimeError, match="are damaged"):
        with offloaded.resident():
            pass


def test_memory_is_freed_after_an_error():
    model = module()
    offloaded = OffloadedWeights(model.parameters())
    with pytest.raises(KeyError), offloaded.resident():
        raise KeyError
    assert device_bytes(model.parameters()) == 0

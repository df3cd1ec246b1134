"""Page-locked memory is allocated in sizes that torch does not round up."""

from __future__ import annotations

import pytest
import torch
from allocations import Allocations

from megatron_gkd.models.host_memory import LARGEST_PIECE, SMALLEST_PIECE, HostMemory, HostTensors, _piece_sizes

GIB = 1 << 30


@pytest.mark.parametrize("num_bytes", [0, 1, 1000, SMALLEST_PIECE, GIB - 1, GIB, GIB + 1, int(16.3 * GIB), 7 * GIB - 5])
def test_torch_rounds_the_allocations_up_by_little(num_bytes):
    sizes = _piece_sizes(num_bytes, LARGEST_PIECE)
    rounded = [1 << (size - 1).bit_length() for size in sizes]  # as torch's allocator of page-locked memory rounds
    assert max(rounded, default=0) <= GIB
    assert num_bytes <= sum(sizes) <= sum(rounded) < num_bytes + SMALLEST_PIECE


@pytest.mark.parametrize("largest", [16, 32, 256, 1 << 20])
def test_bytes_may_lie_across_several_allocations(largest, monkeypatch):
    allocations = Allocations(monkeypatch)
    memory = HostMemory(700, largest)
    assert max(allocations.pinned) <= largest and 700 <= sum(allocations.pinned) < 700 + SMALLEST_PIECE
    whole = torch.arange(350, dtype=torch.int16)
    memory.write(0, whole)
    memory.write(31, torch.tensor([7, 8, 9], dtype=torch.uint8))
    expected = whole.view(torch.uint8).clone()
    expected[31:34] = torch.tensor([7, 8, 9])
    for offset, length in ((0, 700), (31, 3), (699, 1), (15, 500), (5, 0)):
        found = torch.empty(length, dtype=torch.uint8)
        memory.read(offset, found)
        assert torch.equal(found, expected[offset : offset + length])
        assert sum(len(part) for part in memory.parts(offset, length)) == length
    with pytest.raises(ValueError, match="bytes 600 to 701: outside this memory of 700 bytes"):
        list(memory.parts(600, 101))


@pytest.mark.parametrize("largest", [0, 8, 48])
def test_a_limit_that_is_no_power_of_two_is_refused(largest):
    with pytest.raises(ValueError, match=f"largest_piece is {largest}; it must be a power of two from 16"):
        HostMemory(100, largest)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_tensors_by_name(dtype, monkeypatch):
    tensors = {
        "a": torch.randn(3, 5).t(),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "b": torch.randn(77).bfloat16(),
        "none": torch.empty(0),
    }
    allocations = Allocations(monkeypatch)
    held = HostTensors(tensors, dtype, largest_piece=64)
    assert max(allocations.pinned) == 64
    for name, tensor in tensors.items():
        held.write(name, tensor)
    for name, tensor in tensors.items():
        found = held.read(name, torch.device("cpu"))
        assert found.dtype == (dtype or tensor.dtype) and found.is_contiguous()
        assert torch.equal(found, tensor.to(found.dtype))
    with pytest.raises(ValueError, match=r"a is \[3, 5\]; it must be \[5, 3\]"):
        held.write("a", torch.empty(3, 5))

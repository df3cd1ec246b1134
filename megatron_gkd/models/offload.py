"""Keep weights in page-locked host memory and copy them to the device while they are needed.

Parameters of one dtype share flat device buffers ("slabs") of limited size. The storage of a slab is freed and
allocated again at the same size, so that the allocator returns the same block; the host memory is allocated once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from megatron_gkd.models.host_memory import LARGEST_PIECE, HostMemory
from megatron_gkd.runtime import portability

ALIGNMENT = 16  # bytes: of each parameter in its slab, as vector loads need it


class OffloadedWeights:
    """Owns the storage of `parameters`; outside `resident()` they hold no device memory and must not be read.

    Building it copies parameter after parameter to the host and frees each on the device before the next one: beside
    the weights themselves, the device holds at most the contiguous copy of one parameter that is not contiguous.

    Args:
        parameters: all on one device. Tied parameters (the same elements of one storage) stay tied.
        largest_piece: most bytes of one allocation, a power of two from 16: on the host, and on the device except for
            a slab that a single larger parameter fills.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], largest_piece: int = LARGEST_PIECE) -> None:
        self._slabs = _slabs(parameters, largest_piece)
        self._host = HostMemory(self.num_bytes, largest_piece)
        self._stream = torch.cuda.Stream()
        for slab in self._slabs:
            slab.move_to(self._host)
        portability.synchronize()
        self._checksums = [
            sum(int(_checksum(part.view(slab.word))) for part in self._host.parts(slab.offset, slab.num_bytes))
            for slab in self._slabs
        ]

    @property
    def num_bytes(self) -> int:
        """Device memory in bytes that `resident()` allocates."""
        return sum(slab.num_bytes for slab in self._slabs)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Have the weights on the device inside.

        Raises:
            RuntimeError: the copied weights differ from those that were stored.
        """
        # Memory is allocated and freed on the main stream, so that the student can use it in between; only the copy
        # runs on a side stream.
        for slab in self._slabs:
            slab.allocate()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for slab in self._slabs:
                self._host.read(slab.offset, slab.flat)
        torch.cuda.current_stream().wait_stream(self._stream)
        try:
            self._verify()
            yield
        finally:
            for slab in self._slabs:
                slab.free()

    def _verify(self) -> None:
        sums = [_checksum(slab.flat.view(slab.word)) for slab in self._slabs]
        for slab, found, expected in zip(self._slabs, [int(value) for value in sums], self._checksums, strict=True):
            if found != expected:
                raise RuntimeError(
                    f"the offloaded weights are damaged: checksum {found}, expected {expected} "
                    f"({slab.num_bytes} bytes of {slab.dtype})"
                )


class _Slab:
    """Parameters of one dtype that share a device buffer, at `offset` in the host memory.

    Each entry of `members` holds the parameters that are the same elements.
    """

    def __init__(self, dtype: torch.dtype, offset: int) -> None:
        self.dtype, self.offset, self.num_bytes = dtype, offset, 0
        self.members: list[tuple[int, list[nn.Parameter]]] = []  # (start in bytes, parameters)
        self.flat = torch.empty(0, dtype=dtype)

    @property
    def word(self) -> torch.dtype:
        """The integer type of an element's size."""
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[self.dtype.itemsize]

    def add(self, aliases: list[nn.Parameter]) -> None:
        """Append a parameter, with those that are tied to it."""
        self.members.append((self.num_bytes, aliases))
        self.num_bytes += _aligned(aliases[0])

    def move_to(self, host: HostMemory) -> None:
        """Copy the parameters to `host` and make them views of a new buffer without memory."""
        shapes = [aliases[0].shape for _, aliases in self.members]
        device = self.members[0][1][0].device
        for start, aliases in self.members:
            host.write(self.offset + start, aliases[0])
            for parameter in aliases:
                parameter.data = torch.empty(0, dtype=self.dtype, device=device)
        self.flat = torch.empty(self.num_bytes // self.dtype.itemsize, dtype=self.dtype, device=device)
        for (start, aliases), shape in zip(self.members, shapes, strict=True):
            first = start // self.dtype.itemsize
            for parameter in aliases:
                parameter.data = self.flat[first : first + shape.numel()].view(shape)
        self.free()

    def allocate(self) -> None:
        """Allocate the device memory."""
        self.flat.untyped_storage().resize_(self.num_bytes)

    def free(self) -> None:
        """Free the device memory."""
        self.flat.untyped_storage().resize_(0)


def _slabs(parameters: Iterable[nn.Parameter], largest: int) -> list[_Slab]:
    """Distribute parameters over slabs of at most `largest` bytes; a larger parameter has its own slab."""
    aliases: dict[object, list[nn.Parameter]] = {}
    for parameter in dict.fromkeys(parameters):
        aliases.setdefault(_elements(parameter), []).append(parameter)
    by_dtype: dict[torch.dtype, list[list[nn.Parameter]]] = {}
    for group in aliases.values():
        by_dtype.setdefault(group[0].dtype, []).append(group)
    slabs: list[_Slab] = []
    offset = 0
    for dtype, groups in by_dtype.items():
        slab = None
        for group in groups:
            size = _aligned(group[0])
            if slab is None or slab.num_bytes + size > largest:
                slab = _Slab(dtype, offset)
                slabs.append(slab)
            slab.add(group)
            offset += size
    return slabs


def _elements(parameter: nn.Parameter) -> object:
    """Return a key that is equal for parameters that are the same elements of one storage."""
    data = parameter.data
    if data.numel() == 0:
        return id(parameter)
    return data.untyped_storage()._cdata, data.storage_offset(), data.shape, data.stride(), data.dtype


def _aligned(parameter: nn.Parameter) -> int:
    """Return the parameter's size in bytes, rounded up to ``ALIGNMENT``."""
    return -(-parameter.numel() * parameter.element_size() // ALIGNMENT) * ALIGNMENT


def _checksum(words: Tensor) -> Tensor:
    """Return the sum of integers, which is exact and the same on every device."""
    return words.sum(dtype=torch.int64)

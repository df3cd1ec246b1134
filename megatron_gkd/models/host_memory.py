"""Hold copies of tensors in page-locked host memory.

torch rounds every page-locked allocation up to a power of two: one of 16.3 GiB would take 32 GiB. So the memory
consists of several allocations whose sizes are powers of two; together they exceed what is needed by less than
``SMALLEST_PIECE``. A tensor may lie across several of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_gkd.runtime import portability

LARGEST_PIECE = 1 << 30
SMALLEST_PIECE = 1 << 16


class HostMemory:
    """`num_bytes` of page-locked host memory, addressed by byte offsets.

    Args:
        num_bytes: the size; 0 is allowed.
        largest_piece: size of the largest single allocation in bytes, a power of two from 16.
    """

    def __init__(self, num_bytes: int, largest_piece: int = LARGEST_PIECE) -> None:
        if largest_piece < 16 or largest_piece.bit_count() != 1:
            raise ValueError(f"largest_piece is {largest_piece}; it must be a power of two from 16")
        self.num_bytes = num_bytes
        self._pieces = [portability.pinned_bytes(size) for size in _piece_sizes(num_bytes, largest_piece)]

    def write(self, offset: int, tensor: Tensor) -> None:
        """Copy the elements of `tensor`, in row-major order, to `offset`; asynchronously from a GPU."""
        flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
        start = 0
        for part in self.parts(offset, len(flat)):
            part.copy_(flat[start : start + len(part)], non_blocking=True)
            start += len(part)

    def read(self, offset: int, tensor: Tensor) -> None:
        """Overwrite the contiguous `tensor` with the bytes at `offset`; asynchronously to a GPU."""
        flat = tensor.detach().view(-1).view(torch.uint8)
        start = 0
        for part in self.parts(offset, len(flat)):
            flat[start : start + len(part)].copy_(part, non_blocking=True)
            start += len(part)

    def parts(self, offset: int, num_bytes: int) -> Iterator[Tensor]:
        """Yield the bytes [offset, offset + num_bytes) as uint8 views, one for each allocation that holds some."""
        if offset < 0 or offset + num_bytes > self.num_bytes:
            raise ValueError(f"bytes {offset} to {offset + num_bytes}: outside this memory of {self.num_bytes} bytes")
        start = 0  # of the piece
        for piece in self._pieces:
            first, last = max(offset - start, 0), min(offset + num_bytes - start, len(piece))
            if first < last:
                yield piece[first:last]
            start += len(piece)


class HostTensors:
    """Copies of named tensors in page-locked host memory.

    Args:
        like: tensors of the shapes and dtypes to hold.
        dtype: hold all of them in this type instead of their own.
        largest_piece: as for `HostMemory`.
    """

    def __init__(
        self, like: Mapping[str, Tensor], dtype: torch.dtype | None = None, largest_piece: int = LARGEST_PIECE
    ) -> None:
        self._entries: dict[str, tuple[int, torch.Size, torch.dtype]] = {}  # offset in bytes, shape, dtype
        offset = 0
        for name, tensor in like.items():
            kind = dtype or tensor.dtype
            self._entries[name] = (offset, tensor.shape, kind)
            offset += tensor.numel() * kind.itemsize
        self._memory = HostMemory(offset, largest_piece)

    def write(self, name: str, tensor: Tensor) -> None:
        """Replace the copy by `tensor`, converted to the type that it is held in; asynchronously from a GPU."""
        offset, shape, dtype = self._entries[name]
        if tensor.shape != shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; it must be {list(shape)}")
        self._memory.write(offset, tensor.to(dtype))

    def read(self, name: str, device: torch.device) -> Tensor:
        """Return a new contiguous tensor on `device`; filled asynchronously on a GPU."""
        offset, shape, dtype = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype, device=device)
        self._memory.read(offset, tensor)
        return tensor


def _piece_sizes(num_bytes: int, largest: int) -> list[int]:
    """Return powers of two of at most `largest` that add up to `num_bytes`, or to less than ``SMALLEST_PIECE`` more."""
    smallest = min(SMALLEST_PIECE, largest)
    left = -(-num_bytes // smallest) * smallest
    sizes = [largest] * (left // largest)
    left %= largest
    return sizes + [1 << bit for bit in reversed(range(left.bit_length())) if left >> bit & 1]

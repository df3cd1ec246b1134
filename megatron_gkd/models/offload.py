"""Weights that live in pinned host memory and visit the device.

All parameters of one dtype share a flat device buffer. Its storage is freed and taken again at the same size, so the
allocator hands back the same block; the host copy is allocated once. One copy a dtype moves everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from megatron_gkd.runtime import portability


class OffloadedWeights:
    """Owns the storage of `parameters`; outside `resident()` they hold no device memory and must not be read."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter]):
        by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in dict.fromkeys(parameters):
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        self._buffers = [_FlatBuffer(group) for group in by_dtype.values()]
        self._stream = torch.cuda.Stream()
        for buffer in self._buffers:
            buffer.drop()

    @property
    def num_bytes(self) -> int:
        """Device memory in bytes that `resident()` takes."""
        return sum(buffer.num_bytes for buffer in self._buffers)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """The weights are on the device inside. Raises RuntimeError if what arrived is not what was stored."""
        # Memory is taken and freed on the main stream, so that the student can use it in between; only the copy is on
        # the side.
        for buffer in self._buffers:
            buffer.take()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for buffer in self._buffers:
                buffer.fill()
        torch.cuda.current_stream().wait_stream(self._stream)
        try:
            for buffer in self._buffers:
                buffer.verify()
            yield
        finally:
            for buffer in self._buffers:
                buffer.drop()


class _FlatBuffer:
    def __init__(self, parameters: list[torch.nn.Parameter]):
        sizes = [parameter.numel() for parameter in parameters]
        self.device = torch.cat([parameter.data.reshape(-1) for parameter in parameters])
        self.num_bytes = self.device.untyped_storage().nbytes()
        self.host = portability.pinned_empty_like(self.device)
        self.host.copy_(self.device)
        self.checksum = _checksum(self.host)
        for parameter, view in zip(parameters, self.device.split(sizes), strict=True):
            parameter.data = view.view(parameter.shape)

    def take(self) -> None:
        self.device.untyped_storage().resize_(self.num_bytes)

    def fill(self) -> None:
        self.device.copy_(self.host, non_blocking=True)

    def drop(self) -> None:
        self.device.untyped_storage().resize_(0)

    def verify(self) -> None:
        found = _checksum(self.device)
        if found != self.checksum:
            raise RuntimeError(
                f"the offloaded weights came back wrong: checksum {found}, expected {self.checksum} "
                f"({self.num_bytes} bytes of {self.device.dtype})"
            )


def _checksum(flat: torch.Tensor) -> int:
    """Sum of the raw bytes' words, exact and the same on every device."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return int(flat.view(integer).sum(dtype=torch.int64))

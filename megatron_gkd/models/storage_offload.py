"""Move whole storages between the device and page-locked host memory; the tensors on them stay views of them.

A storage is freed by resizing it to 0 bytes and allocated again at its size, so that buffers, the parameters in them
and the optimizer's shards of those keep pointing at the same elements.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.models.host_memory import LARGEST_PIECE, HostMemory
from megatron_gkd.runtime import portability


@dataclass(frozen=True)
class _Freed:
    """A storage without memory.

    Attributes:
        flat: uint8, the whole storage.
        num_bytes: its size with memory.
        offset: of its content in the host memory; None: it has none, and is zeros when it is back.
    """

    flat: Tensor
    num_bytes: int
    offset: int | None


class StorageOffload:
    """Free the device memory of tensors for a while. The host memory is allocated once, and again where sizes change.

    Args:
        largest_piece: most bytes of one allocation on the host, a power of two from 16.
    """

    def __init__(self, largest_piece: int = LARGEST_PIECE) -> None:
        self._largest_piece = largest_piece
        self._host = HostMemory(0, largest_piece)

    @contextlib.contextmanager
    def away(self, kept: Iterable[Tensor], discarded: Iterable[Tensor] = ()) -> Iterator[int]:
        """Free the tensors' storages inside, where none of them may be read; yield how many bytes are free.

        Args:
            kept: have the same bits afterwards.
            discarded: are zeros afterwards; a storage that is in `kept` too is kept.
        """
        freed = self._free(_storages(kept), _storages(discarded))
        try:
            yield sum(one.num_bytes for one in freed)
        finally:
            for one in freed:
                self._restore(one)

    def _free(self, kept: dict[int, Tensor], discarded: dict[int, Tensor]) -> list[_Freed]:
        freed, offset = [], 0
        for flat in kept.values():
            freed.append(_Freed(flat, len(flat), offset))
            offset += len(flat)
        freed += [_Freed(flat, len(flat), None) for key, flat in discarded.items() if key not in kept]
        if self._host.num_bytes != offset:
            self._host = HostMemory(0, self._largest_piece)  # the former one is freed first
            self._host = HostMemory(offset, self._largest_piece)
        for one in freed:
            if one.offset is not None:
                self._host.write(one.offset, one.flat)
        portability.synchronize()
        for one in freed:
            one.flat.untyped_storage().resize_(0)
        portability.empty_cache()  # vLLM maps memory by itself, and does not use torch's cache
        return freed

    def _restore(self, one: _Freed) -> None:
        one.flat.untyped_storage().resize_(one.num_bytes)
        if one.offset is None:
            one.flat.zero_()
        else:
            self._host.read(one.offset, one.flat)


def _storages(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Return each storage that has memory and can be resized, as uint8, by its address."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in found and storage.nbytes() and storage.resizable():
            found[storage._cdata] = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
    return found

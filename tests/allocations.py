"""The memory that a piece of code allocates: page-locked allocations by size, and the device's peak of live bytes.

On a CPU every tensor outside the page-locked memory counts as one on the device.
"""

from __future__ import annotations

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_gkd.runtime import portability


class Allocations(TorchDispatchMode):
    """Watches every operation inside `with`.

    Attributes:
        pinned: sizes in bytes of page-locked allocations, in order.
        peak: most bytes that the device held after any operation.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, existing: list[torch.Tensor] = ()):
        super().__init__()
        self.pinned: list[int] = []
        self._host: set[int] = set()
        self._kept: list[torch.Tensor] = []
        self._device: dict[int, StorageWeakRef] = {}
        self._allocate = portability.pinned_bytes
        monkeypatch.setattr(portability, "pinned_bytes", self._pinned_bytes)
        for tensor in existing:
            self._watch(tensor)
        self.peak = self.live()

    def _pinned_bytes(self, num_bytes: int) -> torch.Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            found = self._allocate(num_bytes)
        self.pinned.append(num_bytes)
        self._host.add(found.untyped_storage()._cdata)
        self._kept.append(found)  # so that no other storage gets its address
        return found

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._host:
            self._device[storage._cdata] = StorageWeakRef(storage)

    def live(self) -> int:
        """Return the bytes that the device holds now."""
        self._device = {key: reference for key, reference in self._device.items() if not reference.expired()}
        storages = (torch.UntypedStorage._new_with_weak_ptr(key) for key in self._device)
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._watch(leaf)
        self.peak = max(self.peak, self.live())
        return found

"""Memory of a CPU for the logits of chunks, which the next microbatch's reuse.

The C library returns large blocks to the system when they are freed. With each new one the system clears its pages at
the first access, one page fault for 4 KiB, which took a tenth of the time of a step. A GPU's memory is kept by torch.
"""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

_free: list[torch.UntypedStorage] = []
_lock = threading.Lock()
_MOST_FREE = 3  # two models' logits, and those of the next chunk


def take(like: Tensor, *shape: int) -> Tensor:
    """Return an uninitialized tensor of `shape` with the dtype and the device of `like`; see `give_back`."""
    if like.device.type != "cpu":
        return like.new_empty(shape)
    storage = _take_storage(math.prod(shape) * like.dtype.itemsize)
    with torch.inference_mode(False):
        if storage is None:
            return torch.empty(shape, dtype=like.dtype)
        return torch.empty(0, dtype=like.dtype).set_(storage, 0, shape)  # type: ignore[call-overload]  # untyped


def _take_storage(num_bytes: int) -> torch.UntypedStorage | None:
    """Return the smallest free storage that is large enough; if there is none, drop the largest one."""
    with _lock:
        _free.sort(key=len)
        for index, storage in enumerate(_free):
            if len(storage) >= num_bytes:
                return _free.pop(index)
        if _free:  # it would never be used again where microbatches have grown
            _free.pop()
        return None


def give_back(tensor: Tensor) -> None:
    """Let later calls of `take` reuse the memory of what one returned, or of a view of it, which nobody may read."""
    storage = tensor.untyped_storage()
    with _lock:
        if storage.device.type == "cpu" and len(_free) < _MOST_FREE:
            _free.append(storage)

"""Tensors of files that are read on demand."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class LazyTensor(Protocol):
    """A tensor of a file, which mcore-bridge reads with `load`."""

    def load(self) -> Tensor:
        """Read the tensor."""
        ...

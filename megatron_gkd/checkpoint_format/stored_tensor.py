"""A tensor in a safetensors file."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it. `file` is a name in the checkpoint's folder."""

    file: str
    shape: Shape
    dtype: str

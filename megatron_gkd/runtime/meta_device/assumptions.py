"""What the replaced functions assume of the run that is planned; set by `planning` before a model is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Assumptions:
    """The kernels and the data of the run.

    Attributes:
        fused_norms: whether norms are Transformer Engine's, which keep their input alone.
        fused_attention: whether attention is Transformer Engine's; else that of the PyTorch fallback.
        fused_optimizer: whether the optimizer is Transformer Engine's or apex'; else torch's.
        expert_imbalance: how many times the mean number of tokens this expert-parallel rank's experts get.
    """

    fused_norms: bool = True
    fused_attention: bool = True
    fused_optimizer: bool = True
    expert_imbalance: float = 1.0


_current = Assumptions()


def current() -> Assumptions:
    """Return the assumptions that hold now."""
    return _current


@contextlib.contextmanager
def assuming(**changes: bool | float) -> Iterator[None]:
    """Change the assumptions inside; the names are those of `Assumptions`."""
    global _current
    outside = _current
    _current = replace(_current, **changes)  # type: ignore[arg-type]
    try:
        yield
    finally:
        _current = outside

"""Collectives on the meta device, which do nothing."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._tools.fake_collectives

_LIBRARY = torch.library.Library("c10d", "IMPL")
_MISSING = (
    "allreduce_coalesced_",
    "reduce_scatter_tensor_coalesced_",
    "allgather_into_tensor_coalesced_",
    "allgather_coalesced_",
)
"""Collectives of Megatron's DistributedDataParallel, of which torch 2.13 has no kernel for the meta device."""


def register_kernels() -> None:
    """Register kernels for the collectives that have none, and leave the objects of other ranks empty."""
    for name in _MISSING:
        with contextlib.suppress(RuntimeError):  # of a torch that has one
            _LIBRARY.impl(name, _do_nothing, "Meta")
    dist.all_gather_object = _gather_own_object  # type: ignore[assignment]  # its parameters have no types in torch


def _gather_own_object(objects: list[Any], own: Any, group: dist.ProcessGroup | None = None) -> None:
    """Put this rank's object, a list, in its place, and empty lists in those of ranks that do not exist."""
    objects[:] = [[] for _ in objects]
    objects[dist.get_rank(group)] = own


def _do_nothing(*args: Any) -> Any:
    from torch._C._distributed_c10d import FakeWork

    return FakeWork.boxed(FakeWork())

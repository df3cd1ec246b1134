"""Count what operations allocate, compute and send, as they are dispatched."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry


class Collective(NamedTuple):
    """A kind of operation of this rank.

    Attributes:
        group_name: of the process group.
        operation: `all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `broadcast` or `send`.
        num_bytes: bytes of one operation, whole: the output of a gather, the input of a scatter or an all-to-all,
            either side of an all-reduce, the message of a send.
    """

    group_name: str
    operation: str
    num_bytes: int


class Meter(TorchDispatchMode):
    """Counts while it is active; several passes may follow each other.

    Attributes:
        live: bytes of the storages on the device that exist now and were seen.
        peak: the most bytes of `live` since `reset_peak`.
        flops: of matrix products, convolutions, and what reports its own.
        collectives: how often each kind was called.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.flops = 0.0
        self.collectives: Counter[Collective] = Counter()
        self._device_type = device_type
        self._seen: set[int] = set()

    def track(self, *trees: Any) -> None:
        """Count the storages of the tensors in some structures, until they are freed."""
        for tensor in tree_iter(trees):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device_type:
                self._track(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def __enter__(self) -> Meter:
        """Become active."""
        _ACTIVE.append(self)
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        """Become inactive."""
        _ACTIVE.remove(self)
        super().__exit__(*exc)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call an operation and count it."""
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        else:
            compute = flop_registry.get(func._overloadpacket)
            if compute is not None and not _reports_itself(func):
                self.flops += compute(*args, **(kwargs or {}), out_val=result)
        self.track(result)
        return result

    def _track(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.live += size
        weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size

    def _count(self, name: str, args: tuple) -> None:
        if name in _WITHOUT_DATA:
            return
        operation, whole = _OPERATIONS[name]
        num_bytes = sum(tensor.nbytes for tensor in tree_iter(args[whole]) if isinstance(tensor, Tensor))
        self.collectives[Collective(_group_of(args).group_name, operation, num_bytes)] += 1


_ACTIVE: list[Meter] = []

_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "reduce_": ("all_reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "gather_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "scatter_": ("broadcast", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "send": ("send", 0),
}
"""By the name of torch's operation: the name here, and the argument that is whole."""

_WITHOUT_DATA = frozenset({"recv_", "recv_any_source_", "barrier", "monitored_barrier_"})
"""Operations that move nothing, or what the other side of a message counts."""


def record_flops(flops: float) -> None:
    """Add FLOPs to all active meters, of a kernel whose own they can't know."""
    for meter in _ACTIVE:
        meter.flops += flops


def record_sends(group: dist.ProcessGroup, num_bytes: int, count: int) -> None:
    """Add messages to all active meters, of a kernel that sends them by itself."""
    for meter in _ACTIVE:
        meter.collectives[Collective(group.group_name, "send", num_bytes)] += count


def _reports_itself(func: Any) -> bool:
    """Return whether a function of `flop_registry` is a core of attention, whose causal mask it does not know."""
    return "scaled_dot_product" in func._schema.name


def _group_of(args: tuple) -> dist.ProcessGroup:
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return dist.ProcessGroup.unbox(argument)
    raise ValueError("the collective operation has no process group")

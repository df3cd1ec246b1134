"""Count the collectives and messages of a piece of code, by process group."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime.transformer_engine import causal_attention

OPERATIONS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "alltoall_": "all_to_all",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}
"""The operators of torch.distributed that `CollectiveCounter` counts, and their names."""


MEGATRON = {
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "world",
    "EMBEDDING_GROUP": "embedding",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "ep",
}
"""Groups that only Megatron-Core uses, and their names here."""


class CollectiveCounter(TorchDispatchMode):
    """Count what the code inside sends, under `(group, operation)`.

    Operations over a group of one rank do not count. An operator of torch.distributed that has no name in `OPERATIONS`
    counts under its own.

    Args:
        groups: the groups by name; another group counts under its own description.

    Attributes:
        counts: number of operations.
        num_bytes: bytes of this rank's tensors.
    """

    def __init__(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        super().__init__()
        self._names = {group.group_name: name for name, group in groups.items() if group.size() > 1}
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_bytes: Counter[tuple[str, str]] = Counter()

    def __enter__(self) -> CollectiveCounter:
        self._outside = attention_biases_outside_modes()
        self._outside.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._outside.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _name(self, group: dist.ProcessGroup) -> str:
        description = getattr(group, "group_desc", "")
        return self._names.get(group.group_name) or MEGATRON.get(description) or description or group.group_name

    def _count(self, func: Any, args: Sequence[Any]) -> None:
        group = next((group for group in map(_group, args) if group is not None), None)
        if group is None or group.size() == 1:
            return
        operator = func.overloadpacket.__name__
        operation = OPERATIONS.get(operator, operator)
        name = "pp" if operation in ("send", "recv") else self._name(group)
        key = name, operation
        self.counts[key] += 1
        self.num_bytes[key] += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(args[0]))


@contextlib.contextmanager
def attention_biases_outside_modes() -> Iterator[None]:
    """Let torch make a causal bias under a dispatch mode.

    It is a tensor subclass whose constructor calls `torch.empty`, which has a Python object already under a mode.
    """
    make = causal_attention.causal_lower_right

    def outside(*sizes: int) -> Any:
        with _disable_current_modes():
            return make(*sizes)

    causal_attention.causal_lower_right = outside
    try:
        yield
    finally:
        causal_attention.causal_lower_right = make


def groups_of(mesh: Any) -> dict[str, dist.ProcessGroup]:
    """Return the groups of a `Mesh` by name. One that has the ranks of another has the name of the first."""
    names = {"world": dist.group.WORLD, "ep": mesh.ep, "tp": mesh.tp, "pp": mesh.pp, "cp": mesh.cp}
    return names | {"dp": mesh.dp, "dp_cp": mesh.dp_cp, "expert_dp": mesh.expert_dp}


def _group(argument: Any) -> dist.ProcessGroup | None:
    if isinstance(argument, dist.ProcessGroup):
        return argument
    if isinstance(argument, torch.ScriptObject):
        with contextlib.suppress(RuntimeError):  # a ReduceOp
            return dist.ProcessGroup.unbox(argument)
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(value):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)

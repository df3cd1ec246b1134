"""The states of the distributed optimizer for a checkpoint, in host memory, only on the ranks that write them.

Megatron-Core's own `sharded_param_state_fully_reshardable` gathers whole buffers on every data-parallel rank, through
several copies of 4 bytes a parameter for each state in host memory and one on the device, and drops the padding between
buckets (see ``docs/upstream_defects.md``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.current_phase import note_progress

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

KEYS = ("param", "exp_avg", "exp_avg_sq")
CHUNK = 1 << 26
"""Most elements that a rank receives in one collective."""
_NOTHING = torch.zeros(())
_STORAGES = "_megatron_gkd_storages"


def like(shard: Any, data: Tensor, prefix: str) -> Any:
    """Return a copy of a sharded tensor with another key and tensor. A factory of shards has no dtype of its own."""
    dtype = {"dtype": data.dtype} if hasattr(shard, "dtype") else {}
    return replace(shard, key=f"{prefix}.{shard.key}", data=data, **dtype)


def sharded_states(
    optimizer: DistributedOptimizer, model_state: dict[str, Any], *, is_loading: bool
) -> dict[int, dict[str, Any]]:
    """Return the sharded states of all parameters, by their index and `KEYS`.

    All ranks of the data-parallel group must call it. Ranks that hold no main replica of a parameter get tensors
    without memory, which are not written.

    Args:
        optimizer: of the parameters in `model_state`.
        model_state: the model's sharded state dict.
        is_loading: whether the tensors are to be loaded into.
    """
    found, _ = extract_sharded_tensors_and_factories(model_state)
    shards = {shard.data: shard for shard in nested_values(found)}
    state: dict[int, dict[str, Any]] = {}
    storages: set[int] = set()
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (parts,) = ranges.values()  # one for each bucket
        # Each rank loads all, and takes its part of it.
        held = [one for one in buffer.param_index_map if is_loading or is_main_replica(shards[one].replica_id)]
        whole = {parameter: _allocate(parameter) for parameter in held}
        if not is_loading:
            for bucket, part in zip(buffer.buckets, parts, strict=True):
                _gather(optimizer, buffer, bucket, part["param_map"], whole)
        for parameter in buffer.param_index_map:
            states = whole.get(parameter)
            storages |= {one.untyped_storage().data_ptr() for one in (states or {}).values()}
            shape, shard = parameter.shape, shards[parameter]
            flat = dict.fromkeys(KEYS, _NOTHING) if states is None else states
            state[len(state)] = {
                key: like(shard, one.view(shape) if states else one.expand(shape), f"optimizer.state.{key}")
                for key, one in flat.items()
            }
    setattr(optimizer, _STORAGES, frozenset() if is_loading else frozenset(storages))
    return state


def take_storages(optimizer: DistributedOptimizer) -> frozenset[int]:
    """Return the addresses of the tensors that the last `sharded_states` has made, which nothing else changes.

    They hold as long as its result lives, and are returned once.
    """
    storages: frozenset[int] = getattr(optimizer, _STORAGES, frozenset())
    setattr(optimizer, _STORAGES, frozenset())
    return storages


_StatesOf = Callable[[nn.Parameter], dict[str, Tensor]]


def _allocate(parameter: nn.Parameter) -> dict[str, Tensor]:
    return {key: torch.zeros(parameter.numel(), dtype=torch.float32) for key in KEYS}


@dataclass(frozen=True)
class _Places:
    """Where each of several tensors lies in a flat one, which they do not overlap in.

    Attributes:
        starts: of each, rising.
        ends: of each.
        names: of each.
    """

    starts: list[int]
    ends: list[int]
    names: list[nn.Parameter]

    @classmethod
    def of(cls, ranges: Mapping[nn.Parameter, tuple[int, int]]) -> _Places:
        ordered = sorted(((start, end, name) for name, (start, end) in ranges.items()), key=lambda place: place[:2])
        return cls([one[0] for one in ordered], [one[1] for one in ordered], [one[2] for one in ordered])

    def overlaps(self, start: int, end: int) -> Iterator[tuple[nn.Parameter, slice, slice]]:
        """Yield the tensors that lie between `start` and `end`: what of them, and where in that part."""
        for index in range(max(0, bisect_right(self.starts, start) - 1), len(self.names)):
            first, last = max(start, self.starts[index]), min(end, self.ends[index])
            if self.starts[index] >= end:
                return
            if first < last:
                own = slice(first - self.starts[index], last - self.starts[index])
                yield self.names[index], own, slice(first - start, last - start)


def _gather(
    optimizer: DistributedOptimizer,
    buffer: Any,
    bucket: Any,
    param_map: Mapping[nn.Parameter, Mapping[str, Any]],
    whole: Mapping[nn.Parameter, Mapping[str, Tensor]],
) -> None:
    """Copy the states in one bucket, each data-parallel rank's share of it, to the tensors in `whole`."""
    group = optimizer.data_parallel_group
    size = group.size()
    length = bucket.grad_data.numel() // size  # of a rank's share
    own = _Places.of({one: (at["gbuf_local"].start, at["gbuf_local"].end) for one, at in param_map.items()})
    everywhere = _Places.of({one: (start, end) for one, (start, end, _) in buffer.param_index_map.items()})
    states = _remember_last(optimizer._get_main_param_and_optimizer_states)
    chunk = max(1, CHUNK // size)
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        note_progress()
        pieces = {key: torch.zeros(end - start, device=portability.device()) for key in KEYS}
        for parameter, part, place in own.overlaps(start, end):
            for key, piece in pieces.items():
                piece[place].copy_(states(parameter)[key].detach().flatten()[part])
        for key, piece in pieces.items():
            gathered = [piece] if size == 1 else [torch.empty_like(piece) for _ in range(size)]
            if size > 1:
                dist.all_gather(gathered, piece, group=group)
            for rank, one in enumerate(gathered):
                first = bucket.offset + rank * length + start
                for parameter, part, place in everywhere.overlaps(first, first + end - start):
                    if parameter in whole:
                        whole[parameter][key][part].copy_(one[place])


def _remember_last(function: _StatesOf) -> _StatesOf:
    """Call `function` once for equal arguments in a row: some optimizers convert the whole state in it."""
    last: list[Any] = [None, {}]

    def call(parameter: nn.Parameter) -> dict[str, Tensor]:
        if last[0] is not parameter:
            last[:] = parameter, function(parameter)
        return last[1]

    return call

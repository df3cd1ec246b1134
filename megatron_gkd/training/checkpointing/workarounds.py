"""Workarounds for defects of Megatron-Core's optimizers in checkpoints; see ``docs/upstream_defects.md``.

The defects occur in 0.16.1, and the code of 0.19.2 is the same in these places. Two of them give no error: without the
workaround a resumed run has a wrong optimizer state.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime import portability
from megatron_gkd.training.checkpointing.gathered_states import sharded_states, take_storages
from megatron_gkd.training.checkpointing.master_weights import restore_master_weights
from megatron_gkd.training.hybrid_optimizer import HostOptimizer
from megatron_gkd.training.optimizer_state import adams, optimizer_parts

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

_MARK = "_megatron_gkd_repaired"


def apply_workarounds() -> None:
    """Patch the class `DistributedOptimizer`. Idempotent."""
    if getattr(DistributedOptimizer, _MARK, False):
        return
    setattr(DistributedOptimizer, _MARK, True)
    restore_master_weights()
    _keep_own_step()
    _gather_states_ourselves()


def adam_states(optimizer: MegatronOptimizer) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the parameters of torch's Adam with their states. Other implementations have no `step` per parameter."""
    for adam in adams(optimizer):
        for one in adam.sub_optimizers if isinstance(adam, HostOptimizer) else (adam,):
            if isinstance(one, torch.optim.Adam | torch.optim.AdamW):
                yield from ((p, one.state[p]) for group in one.param_groups for p in group["params"])


def fill_empty_states(optimizer: MegatronOptimizer) -> None:
    """Add a state to parameters that were never updated: `DistributedOptimizer.state_dict` asserts that it exists."""
    for adam in adams(optimizer):
        if isinstance(adam, HostOptimizer):
            adam.fill_empty_states()
        elif hasattr(adam, "initialize_state"):  # Transformer Engine's, or its fallback
            for parameter in (p for group in adam.param_groups for p in group["params"] if not adam.state[p]):
                has_remainders = adam.store_param_remainders and parameter.dtype == torch.bfloat16
                adam.initialize_state(parameter, has_remainders)
    for parameter, state in adam_states(optimizer):
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}


def agree_on_step(optimizer: MegatronOptimizer) -> float:
    """Return the number of Adam's updates, on ranks without parameters too. All ranks must call it."""
    own = max((float(state["step"]) for _, state in adam_states(optimizer) if state), default=0.0)
    step = torch.tensor(own, dtype=torch.float64, device=portability.device())
    dist.all_reduce(step, op=dist.ReduceOp.MAX)
    return step.item()


@contextlib.contextmanager
def with_step_of_others(optimizer: MegatronOptimizer, step: float) -> Iterator[None]:
    """Let ranks whose share of the distributed optimizer is empty report `step` inside the context.

    A pipeline stage without adapters has no parameters, and few adapters are not enough for all data-parallel ranks.
    `DistributedOptimizer.state_dict` asserts that there is a parameter with a step; and what is common to all ranks is
    saved by rank 0, which may be one of these.
    """
    empty = [
        part.optimizer
        for part in optimizer_parts(optimizer)
        if isinstance(part, DistributedOptimizer) and not part.is_stub_optimizer and not part.optimizer.state
    ]
    for adam in empty:
        adam.state_dict = partial(_state_with_step, adam.state_dict, step)
    try:
        yield
    finally:
        for adam in empty:
            del adam.state_dict


def add_common_step(optimizer: MegatronOptimizer, state: dict[Any, Any], step: float) -> None:
    """Add `step` to the state of optimizers that are not distributed.

    Megatron leaves it out in a rank without parameters, of which rank 0 saves what all ranks load, and where it is 0.
    """
    parts = optimizer_parts(optimizer)
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    for part, own in zip(parts, states, strict=True):
        if not isinstance(part, DistributedOptimizer):
            inner = own["optimizer"] if "optimizer" in own else own
            inner["state"].setdefault("common_step", torch.tensor(step))


def _state_with_step(state_dict: Callable[[], dict[str, Any]], step: float) -> dict[str, Any]:
    return state_dict() | {"state": {0: {"step": torch.tensor(step)}}}


def storages_of_states(optimizer: MegatronOptimizer) -> frozenset[int]:
    """Return what `gathered_states.take_storages` returns, of all parts of an optimizer."""
    parts = [part for part in optimizer_parts(optimizer) if isinstance(part, DistributedOptimizer)]
    return frozenset[int]().union(*map(take_storages, parts))


def separate_steps(optimizer: MegatronOptimizer) -> None:
    """Give each parameter its own `step` tensor.

    `load_state_dict` puts one tensor into all states, and torch's Adam would then count it once for every parameter.
    """
    for _, state in adam_states(optimizer):
        state["step"] = state["step"].clone()


def _keep_own_step() -> None:
    """Keep `step` when tensors without it are loaded (fully_reshardable: KeyError)."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def with_own_step(self: DistributedOptimizer, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        own = self._get_main_param_and_optimizer_states(parameter)
        original(self, parameter, {**tensors, **{name: value for name, value in own.items() if name == "step"}})

    DistributedOptimizer._set_main_param_and_optimizer_states = with_own_step


def _gather_states_ourselves() -> None:
    """Replace the gathering of states, which shifts them wherever a buffer has several padded buckets."""
    original = DistributedOptimizer.sharded_param_state_fully_reshardable

    @functools.wraps(original)
    def gathered(
        self: DistributedOptimizer,
        model_sharded_state_dict: dict[str, Any],
        is_loading: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> dict[int, dict[str, Any]]:
        return sharded_states(self, model_sharded_state_dict, is_loading=is_loading)

    DistributedOptimizer.sharded_param_state_fully_reshardable = gathered

"""The tensors of a checkpoint, as Megatron's sharded state dict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_gkd.models.lora.sharded import sharded_factors
from megatron_gkd.models.megatron_model import MegatronModel
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.self_weights import AverageWeights
from megatron_gkd.training.checkpointing.gathered_states import like
from megatron_gkd.training.checkpointing.workarounds import (
    add_common_step,
    agree_on_step,
    fill_empty_states,
    storages_of_states,
    with_step_of_others,
)
from megatron_gkd.training.student import Student

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

_NO_SIZES = ("token_multiple",)  # it pads sequences
FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


class StateToWrite(dict[str, Any]):
    """A sharded state dict.

    Attributes:
        storages: addresses of tensors that belong to it alone, which need not be copied before the next step.
    """

    storages: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Saved:
    """The parts of a run whose tensors are saved.

    Attributes:
        student: the model in training and its optimizer.
        averages: the moving averages of self-teachers.
        with_optimizer: recipe key `output.save_optim`.
    """

    student: Student
    averages: tuple[AverageWeights, ...] = ()
    with_optimizer: bool = True

    def to_write(self) -> StateToWrite:
        """Return the sharded state dict to save."""
        state = StateToWrite(self._tensors(is_loading=False, same_layout=True))
        state.storages = storages_of_states(self.student.optimizer)
        return state

    def description(self) -> dict[str, Any]:
        """Return the plain values that loading needs, for ``run.json``."""
        return {
            "layout": layout_of(self.student.mesh),
            "with_optimizer": self.with_optimizer,
            "only_adapters": self.student.model.adapters is not None,
        }

    def to_read(self, *, same_layout: bool) -> dict[str, Any]:
        """Return the sharded state dict to load into."""
        return self._tensors(is_loading=True, same_layout=same_layout)

    def _tensors(self, *, is_loading: bool, same_layout: bool) -> dict[str, Any]:
        model = self.model_state()
        state: dict[str, Any] = {"model": model}
        if self.with_optimizer:
            optimizer = self.student.optimizer
            fill_empty_states(optimizer)  # of a student whose steps were all skipped, or a new one
            step = agree_on_step(optimizer)
            with with_step_of_others(optimizer, step):
                found = optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=dict(FORMAT))
            add_common_step(optimizer, found, step)
            state["optimizer"] = found
        if self.averages:
            state["averages"] = self._average_state(model)
        if same_layout:
            state["random"] = ShardedObject("random", random_states(), (dist.get_world_size(),), (dist.get_rank(),))
        return state

    def model_state(self) -> dict[str, Any]:
        """Return the trained parameters of the student alone."""
        self.student.gather_parameters()
        return model_state(self.student.model)

    def _average_state(self, model: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Return the averages in fp32, sharded as their parameters."""
        state: dict[str, dict[str, Any]] = {}
        for number, average in enumerate(self.averages):
            held = average.by_parameter()
            state[str(number)] = {
                str(index): like(shard, held[shard.data], f"average{number}")
                for index, shard in enumerate(_shards_of(held, model))
            }
        return state

    def load_averages(self, found: dict[str, dict[str, Tensor]]) -> None:
        """Set the averages that were loaded for ``_average_state``."""
        for number, average in enumerate(self.averages):
            held = average.by_parameter()
            shards = enumerate(_shards_of(held, self.model_state()))
            average.replace(held | {shard.data: found[str(number)][str(index)] for index, shard in shards})


def model_state(model: MegatronModel) -> dict[str, Any]:
    """Return the sharded state dict of a model's trained weights: its adapters, or all weights."""
    if model.adapters is not None:
        return {"adapters": sharded_factors(model.adapters.factors, model.mesh)}
    with model.mesh.virtual_stages(model.config.virtual_pipeline_model_parallel_size):
        return {f"model{index}": _sharded_state(chunk) for index, chunk in enumerate(model.chunks)}


def _sharded_state(chunk: Any) -> dict[str, Any]:
    """Return the sharded state dict of a Megatron module; Megatron has no types."""
    return chunk.sharded_state_dict()


def _shards_of(held: dict[nn.Parameter, Tensor], model: dict[str, Any]) -> list[Any]:
    return [shard for shard in nested_values(model) if torch.is_tensor(shard.data) and shard.data in held]


def random_states() -> dict[str, Any]:
    """Return all random states of this rank."""
    return {
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
        "device": portability.random_state(),
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set all random states of this rank from `random_states`."""
    torch.set_rng_state(states["torch"])
    portability.set_random_state(states["device"])
    get_cuda_rng_tracker().set_states(states["tracker"])


def layout_of(mesh: Mesh) -> dict[str, Any]:
    """Return what determines the distribution of tensors and random states over the ranks."""
    sizes = {name: value for name, value in vars(mesh.layout).items() if name not in _NO_SIZES}
    return {"processes": dist.get_world_size(), **sizes}

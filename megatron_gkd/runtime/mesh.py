"""The process groups of a layout.

Only this module and the PyTorch fallback for Transformer Engine, which Megatron-Core calls, use Megatron's global
`parallel_state` (`tests/runtime/test_boundaries.py`).
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.config.schema import ParallelSection

from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel dimensions; data parallelism takes what is left of the world."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    virtual_pipeline: int | None = None
    sequence_parallel: bool = False
    token_multiple: int = 1

    @classmethod
    def from_section(cls, parallel: ParallelSection, token_multiple: int = 1) -> Layout:
        """Return the layout of a recipe's `parallel` section.

        Args:
            parallel: the section.
            token_multiple: divides the number of tokens that each rank computes at once.
        """
        return cls(
            tensor=parallel.tensor_model_parallel_size,
            pipeline=parallel.pipeline_model_parallel_size,
            context=parallel.context_parallel_size,
            expert=parallel.expert_model_parallel_size,
            expert_tensor=parallel.expert_tensor_parallel_size,
            virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
            sequence_parallel=parallel.effective_sequence_parallel,
            token_multiple=token_multiple,
        )

    @property
    def pad_multiple(self) -> int:
        """The number that must divide the length of every sequence.

        Each context-parallel rank gets two zigzag chunks, and each tensor-parallel rank an equal share of them under
        sequence parallelism.
        """
        zigzag = 2 * self.context if self.context > 1 else 1
        return zigzag * (self.tensor if self.sequence_parallel else 1)

    @property
    def total_multiple(self) -> int:
        """The number that must divide the length of a whole microbatch."""
        ranks = self.context * (self.tensor if self.sequence_parallel else 1)
        return math.lcm(self.pad_multiple, self.token_multiple * ranks)


@dataclass(frozen=True)
class Mesh:
    """The groups that this rank is a member of."""

    layout: Layout
    tp: dist.ProcessGroup
    pp: dist.ProcessGroup
    cp: dist.ProcessGroup
    dp: dist.ProcessGroup
    dp_cp: dist.ProcessGroup
    ep: dist.ProcessGroup
    expert_dp: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0 of the world, which writes the files and to the terminal."""
        return dist.get_rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the last pipeline stage, where the logits and the loss are."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """The global rank of the last pipeline stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)

    @property
    def is_leader(self) -> bool:
        """Whether this rank leads its model replica: the last stage's first tensor- and context-parallel rank."""
        return self.is_last_stage and self.tp.rank() == self.cp.rank() == 0

    @contextlib.contextmanager
    def virtual_stages(self, count: int | None) -> Iterator[None]:
        """Set Megatron's global number of virtual stages to `count` inside; the student and a teacher may differ."""
        outside = parallel_state.get_virtual_pipeline_model_parallel_world_size()
        parallel_state.set_virtual_pipeline_model_parallel_world_size(count)
        try:
            yield
        finally:
            parallel_state.set_virtual_pipeline_model_parallel_world_size(outside)

    def sum_from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Sum the last pipeline stages' `values` over data- and context-parallel ranks, in place and on every rank."""
        dist.all_reduce(values, group=self.dp_cp)
        if self.pp.size() > 1:
            dist.broadcast(values, src=self.last_stage_rank, group=self.pp)
        return values

    def broadcast_from_last_stage(self, value: T) -> T:
        """Return the last pipeline stage's `value`, any picklable object, on every rank of the pipeline."""
        return _broadcast(value, self.pp.size() - 1, self.pp)

    def broadcast_from_leader(self, value: T | None) -> T:
        """Return the leader's `value`, any picklable object, on every rank of its model replica."""
        # The source of each broadcast has received the value in those before it.
        if self.is_last_stage and self.tp.rank() == 0:
            value = _broadcast(value, 0, self.cp)
        if self.tp.rank() == 0:
            value = _broadcast(value, self.pp.size() - 1, self.pp)
        return cast(T, _broadcast(value, 0, self.tp))


def _broadcast(value: T, source: int, group: dist.ProcessGroup) -> T:
    if group.size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=dist.get_global_rank(group, source), group=group)
    return values[0]


def set_default_timeout(seconds: float) -> None:
    """Let groups that are created without a time-out, as mcore-bridge does, have this one in place of torch's own."""
    timeout = datetime.timedelta(seconds=seconds)
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def initialize_mesh(layout: Layout, seed: int, timeout: float = 1800.0) -> Mesh:
    """Create the groups of `layout` in an initialized world, and seed every rank's random states.

    Args:
        layout: sizes of the parallel dimensions.
        seed: of the random states.
        timeout: longest time of one collective operation, in seconds.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / 60,  # its type is int, but a timedelta takes fractions
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    return Mesh(
        layout=layout,
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        ep=parallel_state.get_expert_model_parallel_group(),
        expert_dp=parallel_state.get_expert_data_parallel_group(),
    )


def links_of_groups(mesh: Mesh) -> dict[str, tuple[str, int]]:
    """Return the link and the number of ranks of each process group of more than one rank, by the group's name.

    The links are `tp`, `pp`, `cp`, `ep`, `etp`, `dp` and `expert_dp`. A group over several of them has the link with
    the least bandwidth between its ranks in the usual order of ranks, in which tensor-parallel ones are next to each
    other and data-parallel ones far apart.
    """
    layout = mesh.layout
    joined = parallel_state.get_tensor_and_context_parallel_group(check_initialized=False)
    experts = parallel_state.get_expert_tensor_and_model_parallel_group(check_initialized=False)
    replicas = parallel_state.get_tensor_and_data_parallel_group(check_initialized=False, with_context_parallel=True)
    stages = parallel_state.get_expert_tensor_model_pipeline_parallel_group(check_initialized=False)
    groups = {
        "tp": [mesh.tp],
        "cp": [mesh.cp],
        "pp": [
            mesh.pp,
            parallel_state.get_embedding_group(check_initialized=False),
            parallel_state.get_position_embedding_group(check_initialized=False),
        ],
        "dp": [
            mesh.dp,
            mesh.dp_cp,
            replicas,
            parallel_state.get_intra_distributed_optimizer_instance_group(),
            dist.group.WORLD,
        ],
        "etp": [parallel_state.get_expert_tensor_parallel_group(check_initialized=False)],
        "ep": [mesh.ep],
        "expert_dp": [mesh.expert_dp],
    }
    groups["cp" if layout.context > 1 else "tp"].append(joined)
    groups["etp" if layout.expert_tensor > 1 else "ep"].append(experts)
    wide = "pp" if layout.pipeline > 1 else "tp"
    groups[wide] += [parallel_state.get_model_parallel_group(check_initialized=False), stages]
    links: dict[str, tuple[str, int]] = {}
    for link, members in groups.items():
        for group in members:
            if group is not None and group.size() > 1:
                links.setdefault(group.group_name, (link, group.size()))
    return links


def destroy_mesh() -> None:
    """Destroy the groups, so that another layout can be built in the same processes. All ranks must call it."""
    from mcore_bridge.bridge import gpt_bridge
    from megatron.core.transformer.moe import moe_utils

    # Megatron forgets its groups without destroying them, and each of them holds threads.
    for group in parallel_state._global_process_group_list or []:
        if group is not None:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gpt_bridge.EP_PP_GROUP = None
    # It has one entry for each layer of the first model with experts in this process.
    moe_utils.get_moe_layer_wise_logging_tracker().clear()

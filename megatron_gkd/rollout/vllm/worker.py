"""The servers' side of `rollout.weight_sync: gloo`: vLLM's weight-transfer protocol over gloo, for servers on CPUs.

    python -m vllm.entrypoints.openai.api_server --weight-transfer-config '{"backend": "gloo"}'
        --worker-extension-cls megatron_gkd.rollout.vllm_worker.WorkerExtension ...

Needs this package on PYTHONPATH, and nothing but torch and vLLM of its requirements. With nccl vLLM needs none of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_gkd.rollout.vllm import gloo
from megatron_gkd.rollout.vllm.tied_head import repack_tied_head


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """What a worker needs to join the group.

    Attributes:
        master_address: of the store where the ranks find each other.
        master_port: of the store.
        rank_offset: the rank of the server's first worker in the group.
        world_size: number of ranks.
        timeout: seconds that an exchange may take.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors of one buffer, in order. All have one dtype."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """vLLM's nccl engine over gloo, with one buffer an update."""

    init_info_cls, update_info_cls = GlooInitInfo, GlooUpdateInfo
    _group: Any = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the group."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        store_address = (init_info.master_address, init_info.master_port)
        store = gloo.join_store(*store_address, init_info.timeout)
        address = gloo.address_towards(*store_address)
        self._group = gloo.gloo_group(store, rank, init_info.world_size, address, init_info.timeout)

    def start_weight_update(self) -> None:
        """Prepare the model for new weights."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        """Receive a buffer. The base class would also wait for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive a buffer and load its tensors."""
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(update_info.shapes, dtypes, strict=True)]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        self._group.broadcast(buffer, 0).wait()
        parts = zip(update_info.names, buffer.split(sizes), dtypes, update_info.shapes, strict=True)
        self.model.load_weights((name, part.view(dtype).view(shape)) for name, part, dtype, shape in parts)

    def finish_weight_update(self) -> None:
        """Make the model ready to sample from the new weights."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        """Leave the group."""
        self._group = None


class WorkerExtension:
    """Register the backend: every worker imports this class's module. It has no methods of its own."""


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)

"""The servers' side of `rollout.weight_sync: gloo`: vLLM's weight-transfer protocol over gloo, for servers on CPUs.

    python -m vllm.entrypoints.openai.api_server --weight-transfer-config '{"backend": "gloo"}'
        --worker-extension-cls megatron_gkd.rollout.vllm_worker.WorkerExtension ...

Needs this package on PYTHONPATH, and nothing but torch and vLLM of its requirements. With nccl vLLM needs none of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_gkd.rollout.vllm import gloo
from megatron_gkd.rollout.vllm.tied_head import repack_tied_head


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the group meets, the rank of the server's first worker in it, and seconds that an exchange may take."""

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
    """What vLLM's nccl engine does, over gloo, with one buffer an update."""

    init_info_cls, update_info_cls = GlooInitInfo, GlooUpdateInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        meeting = (init_info.master_address, init_info.master_port)
        store = gloo.join_store(*meeting, init_info.timeout)
        self._group = gloo.gloo_group(
            store, rank, init_info.world_size, gloo.address_towards(*meeting), init_info.timeout
        )

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        # The base class also waits for an accelerator.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        dtypes = [getattr(torch, name) for name in update_info.dtype_names]
        sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(update_info.shapes, dtypes, strict=True)]
        buffer = torch.empty(sum(sizes), dtype=torch.uint8)
        self._group.broadcast(buffer, 0).wait()
        parts = zip(update_info.names, buffer.split(sizes), dtypes, update_info.shapes, strict=True)
        self.model.load_weights((name, part.view(dtype).view(shape)) for name, part, dtype, shape in parts)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)

    def shutdown(self) -> None:
        self._group = None


class WorkerExtension:
    """Nothing of its own: importing it, which every worker does, makes the backend known."""


WeightTransferEngineFactory.register_engine("gloo", GlooWeightTransferEngine)

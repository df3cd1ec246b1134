"""The group that weights travel through: rank 0 is the trainer's first rank, the others are a server's workers.

One broadcast takes one buffer of bytes. What differs between the backends is all here; see `weight_transfer.py`.
"""

from __future__ import annotations

import base64
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor
from torch.cuda import nccl

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm import gloo
from megatron_gkd.runtime import portability

_NO_LIMIT = 2**62


class TransferGroup(Protocol):
    """Made first; then the workers are sent the `invitation`, and all of them and this rank `join`."""

    def invitation(self) -> dict[str, Any]:
        """What the server's weight-transfer engine wants to know."""
        ...

    def join(self) -> None:
        """Blocks until all ranks are there."""
        ...

    def broadcast(self, data: Tensor) -> None:
        """`data`, uint8 [bytes] on any device, to all workers. Blocks until they have it."""
        ...

    def close(self) -> None: ...


class GlooGroup:
    """For servers with `vllm_worker.py`; `timeout` in seconds. OSError if there is no way to `url`."""

    def __init__(self, size: int, url: str, timeout: float):
        self.size, self.timeout = size, timeout
        self._store = gloo.open_store(timeout)
        parts = urlsplit(url)
        self._address = gloo.address_towards(parts.hostname, parts.port or 80)
        self._group: dist.ProcessGroupGloo | None = None

    def invitation(self) -> dict[str, Any]:
        return {
            "master_address": self._address,
            "master_port": self._store.port,
            "rank_offset": 1,
            "world_size": self.size,
            "timeout": self.timeout,
        }

    def join(self) -> None:
        self._group = gloo.gloo_group(self._store, 0, self.size, self._address, self.timeout)

    def broadcast(self, data: Tensor) -> None:
        self._group.broadcast(data.cpu(), 0).wait()

    def close(self) -> None:
        # Not aborted: that would wait for a broadcast that nobody takes.
        self._group = self._store = None


class NcclGroup:
    """For vLLM's own nccl backend, which it joins by torch's binding of NCCL: the trainer needs no vLLM.

    UserError without CUDA.
    """

    def __init__(self, size: int):
        self.size = size
        if portability.backend() != "nccl" or not dist.is_nccl_available():
            raise UserError("rollout.weight_sync = nccl: torch finds no CUDA device here; must be gloo or folder")
        self._id = nccl.unique_id()
        self._device = torch.cuda.current_device()
        self._comm: Any = None
        # Its own: sending again must not wait for what a training step has queued, nor the step for the sending.
        self._stream = torch.cuda.Stream()

    def invitation(self) -> dict[str, Any]:
        return {
            "nccl_unique_id_b64": base64.b64encode(self._id).decode(),
            "rank_offset": 1,
            "world_size": self.size,
            "packed": True,
            "packed_buffer_size_bytes": _NO_LIMIT,  # all tensors of one update in one buffer
            "packed_num_buffers": 1,
        }

    def join(self) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._comm = nccl.init_rank(self.size, self._id, 0)
            nccl.all_reduce([torch.zeros(1, device=self._device)], comms=[self._comm])  # the workers begin with one
            self._stream.synchronize()

    def broadcast(self, data: Tensor) -> None:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())  # that makes `data`
            with torch.cuda.stream(self._stream):
                data = data.to(self._device)
                # Bytes are bytes, and torch's binding counts no more than 2^31 elements.
                nccl.broadcast([data.view(torch.int64) if data.numel() % 8 == 0 else data], comms=[self._comm])
                self._stream.synchronize()

    def close(self) -> None:
        self._comm = None

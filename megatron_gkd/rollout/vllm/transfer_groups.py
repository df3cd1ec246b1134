"""The group that weights travel through: rank 0 is the trainer's main rank, the others are a server's workers.

One broadcast takes one buffer of bytes. All differences between the backends are here; see `weight_transfer.py`.
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
    """A group of this rank and the workers. The workers are sent `init_info`, then all ranks `join`."""

    def init_info(self) -> dict[str, Any]:
        """Return what the server's weight-transfer engine needs to join."""
        ...

    def join(self) -> None:
        """Block until all ranks are there."""
        ...

    def broadcast(self, data: Tensor) -> None:
        """Broadcast `data`, uint8 [bytes] on any device, to all workers. Block until they have it."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...


class GlooGroup:
    """A group over gloo, for servers that are started with `vllm_worker.WorkerExtension`.

    Args:
        size: number of ranks, this one included.
        url: of the server.
        timeout: in seconds.

    Raises:
        OSError: there is no route to `url`.
    """

    def __init__(self, size: int, url: str, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self._store: dist.TCPStore | None = gloo.open_store(timeout)
        self._port = self._store.port
        parts = urlsplit(url)
        self._address = gloo.address_towards(parts.hostname or "", parts.port or 80)
        self._group: Any = None

    def init_info(self) -> dict[str, Any]:
        """Return what the server's weight-transfer engine needs to join."""
        return {
            "master_address": self._address,
            "master_port": self._port,
            "rank_offset": 1,
            "world_size": self.size,
            "timeout": self.timeout,
        }

    def join(self) -> None:
        """Block until all ranks are there."""
        if self._store is None:
            raise RuntimeError("the group is closed")
        self._group = gloo.gloo_group(self._store, 0, self.size, self._address, self.timeout)

    def broadcast(self, data: Tensor) -> None:
        """Broadcast `data`, uint8 [bytes] on any device, to all workers. Block until they have it."""
        self._group.broadcast(data.cpu(), 0).wait()

    def close(self) -> None:
        """Leave the group."""
        # Not aborted: that would wait for a broadcast that no worker receives.
        self._group = self._store = None


class NcclGroup:
    """A group over NCCL, for vLLM's own nccl backend. It uses torch's binding of NCCL: the trainer needs no vLLM.

    Args:
        size: number of ranks, this one included.

    Raises:
        UserError: there is no CUDA device.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        if portability.backend() != "nccl" or not dist.is_nccl_available():
            raise UserError(
                "rollout.weight_sync = nccl: torch finds no CUDA device here; allowed without one are gloo and folder"
            )
        self._id = nccl.unique_id()
        self._device = torch.cuda.current_device()
        self._comm: Any = None
        # Its own: sending again must not wait for what a training step has queued, nor the step for the sending.
        self._stream = torch.cuda.Stream()

    def init_info(self) -> dict[str, Any]:
        """Return what the server's weight-transfer engine needs to join."""
        return {
            "nccl_unique_id_b64": base64.b64encode(self._id).decode(),
            "rank_offset": 1,
            "world_size": self.size,
            "packed": True,
            "packed_buffer_size_bytes": _NO_LIMIT,  # all tensors of one update in one buffer
            "packed_num_buffers": 1,
        }

    def join(self) -> None:
        """Block until all ranks are there."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._comm = nccl.init_rank(self.size, self._id, 0)
            nccl.all_reduce([torch.zeros(1, device=self._device)], comms=[self._comm])  # the workers begin with one
            self._stream.synchronize()

    def broadcast(self, data: Tensor) -> None:
        """Broadcast `data`, uint8 [bytes] on any device, to all workers. Block until they have it."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())  # that makes `data`
            with torch.cuda.stream(self._stream):
                data = data.to(self._device)
                # Bytes are bytes, and torch's binding counts no more than 2^31 elements.
                nccl.broadcast([data.view(torch.int64) if data.numel() % 8 == 0 else data], comms=[self._comm])
                self._stream.synchronize()

    def close(self) -> None:
        """Leave the group."""
        self._comm = None

"""The group over NCCL, as far as one machine can test it; over gloo it is tested with the transfer."""

from __future__ import annotations

import base64
import multiprocessing

import pytest
import torch
from torch.cuda import nccl

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm.transfer_groups import NcclGroup


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nccl_without_a_gpu_is_refused():
    with pytest.raises(UserError, match=r"rollout.weight_sync = nccl: torch finds no CUDA device here"):
        NcclGroup(2)


def receive(connection):
    """As vLLM's worker does: join, add up one number, and receive each buffer."""
    with torch.cuda.device(1):
        init_info, sizes = connection.recv()
        comm = nccl.init_rank(init_info["world_size"], base64.b64decode(init_info["nccl_unique_id_b64"]), 1)
        nccl.all_reduce([torch.zeros(1, device=1)], comms=[comm])
        received = [torch.empty(size, dtype=torch.uint8, device=1) for size in sizes]
        for buffer in received:
            nccl.broadcast([buffer], comms=[comm])
        torch.cuda.synchronize()
        connection.send([buffer.cpu().numpy() for buffer in received])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_is_broadcast_over_nccl_arrives():
    """Whether its bytes divide by eight or not, and from the host, too."""
    group = NcclGroup(2)
    sent = [
        torch.randint(256, (size,), dtype=torch.uint8, device=device) for size, device in ((64, 0), (13, 0), (9, "cpu"))
    ]
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=receive, args=(theirs,))
    worker.start()
    ours.send((group.init_info(), [data.numel() for data in sent]))
    group.join()
    for data in sent:
        group.broadcast(data)
    assert ours.poll(60)
    assert all((data.cpu().numpy() == found).all() for data, found in zip(sent, ours.recv(), strict=True))
    worker.join()
    group.close()


@pytest.mark.gpu
def test_one_rank_alone_joins_and_broadcasts():
    """torch's binding takes these arguments."""
    group = NcclGroup(1)
    group.join()
    group.broadcast(torch.arange(16, dtype=torch.uint8, device="cuda"))
    group.close()

"""Groups between processes that have no world in common: a trainer's rank and the workers of inference servers.

Needs torch alone, so that a server can import it.
"""

from __future__ import annotations

import datetime
import os
import socket

import torch.distributed as dist


def address_towards(host: str, port: int) -> str:
    """The address of this machine that `host` sees. OSError if there is no way to it."""
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]


def open_store(timeout: float) -> dist.TCPStore:
    """A new meeting point at a free port of this machine. `timeout` in seconds."""
    seconds = datetime.timedelta(seconds=timeout)
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=seconds)


def join_store(host: str, port: int, timeout: float) -> dist.TCPStore:
    return dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout))


def gloo_group(store: dist.Store, rank: int, size: int, address: str, timeout: float) -> dist.ProcessGroupGloo:
    """Blocks until all `size` ranks are there. Others reach this one at `address`, unless GLOO_SOCKET_IFNAME is set.

    Each exchange, and the meeting, may take `timeout` seconds.
    """
    options = dist.ProcessGroupGloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        options._devices = [dist.ProcessGroupGloo.create_default_device()]
    else:
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    return dist.ProcessGroupGloo(store, rank, size, options)

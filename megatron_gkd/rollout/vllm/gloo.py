"""Groups between processes that have no world in common: a trainer's rank and the workers of inference servers.

Needs torch alone, so that a server can import it.
"""

from __future__ import annotations

import datetime
import os
import socket
from typing import Any

import torch.distributed as dist


def address_towards(host: str, port: int) -> str:
    """Return the address of this machine that `host` sees.

    Raises:
        OSError: there is no route to it.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return probe.getsockname()[0]


def open_store(timeout: float) -> dist.TCPStore:
    """Open a new store at a free port of this machine, for ranks to find each other. `timeout` is in seconds."""
    seconds = datetime.timedelta(seconds=timeout)
    return dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=seconds)


def join_store(host: str, port: int, timeout: float) -> dist.TCPStore:
    """Connect to the store that another process has opened. `timeout` is in seconds."""
    return dist.TCPStore(host, port, is_master=False, timeout=datetime.timedelta(seconds=timeout))


def gloo_group(store: dist.Store, rank: int, size: int, address: str, timeout: float) -> Any:
    """Create a process group, waiting until all `size` ranks are there.

    Args:
        store: where the ranks find each other.
        rank: of this process.
        size: number of ranks.
        address: at which others reach this one, unless GLOO_SOCKET_IFNAME is set.
        timeout: seconds for each exchange, and for the connection.

    Returns:
        A ProcessGroupGloo; torch has no types for its methods.
    """
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = datetime.timedelta(seconds=timeout)
    if "GLOO_SOCKET_IFNAME" in os.environ:
        options._devices = [gloo.create_default_device()]
    else:
        options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)

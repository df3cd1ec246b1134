"""Decide which node holds the rendezvous, and wait for it."""

from __future__ import annotations

import errno
import socket

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import hosts


def is_host(host: str, port: int, node_rank: int | None, named_within: float = hosts.NAMED_WITHIN_S) -> bool:
    """Return whether this node is to hold the rendezvous: node 0, or else the first one that HOST names.

    Raises:
        UserError: the name of the host is unknown, or node 0 cannot listen at the port.
    """
    family, address = hosts.resolve(host, port, _key(host, port), named_within)
    if node_rank is not None and node_rank != 0:
        return False
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address if node_rank is None else ("", port))
            listener.listen()
        except OSError as error:
            if node_rank is None and error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                return False
            raise UserError(f"{_key(host, port)}: this node cannot listen there: {error.strerror}") from error
    return True


def wait_for_host(host: str, port: int, seconds: float) -> None:
    """Wait until the rendezvous accepts connections.

    Raises:
        UserError: it does not within `seconds`.
    """
    hosts.wait_for_port(host, port, _key(host, port), "the rendezvous", seconds)


def _key(host: str, port: int) -> str:
    return f"--rdzv = {host}:{port}"

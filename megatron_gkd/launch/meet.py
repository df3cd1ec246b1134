"""Find the node that holds the rendezvous, and wait for it; errors are one line, where torch prints tracebacks."""

from __future__ import annotations

import errno
import socket
import sys
import time
from typing import Any

from megatron_gkd.errors import UserError

_NAMED_WITHIN_S = 60.0  # some clusters publish a node's name only once it runs
_REPORTED_AFTER_S = 10.0


def is_host(host: str, port: int, node_rank: int | None, named_within: float = _NAMED_WITHIN_S) -> bool:
    """Return whether this node is to hold the rendezvous: node 0, or else the first one that HOST names.

    Raises:
        UserError: the name of the host is unknown, or node 0 cannot listen at the port.
    """
    family, address = _resolve(host, port, named_within)
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
            raise UserError(f"--rdzv = {host}:{port}: this node cannot listen there: {error.strerror}") from error
    return True


def wait_for_host(host: str, port: int, seconds: float) -> None:
    """Wait until the rendezvous accepts connections.

    Raises:
        UserError: it does not within `seconds`.
    """
    start, is_reported = time.monotonic(), False
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            waited = time.monotonic() - start
            if waited > seconds:
                reason = error.strerror or error
                raise UserError(f"--rdzv = {host}:{port}: cannot be reached for {seconds:g} s: {reason}") from error
        if waited > _REPORTED_AFTER_S and not is_reported:
            is_reported = True
            print(f"waiting for the rendezvous at {host}:{port}", file=sys.stderr, flush=True)
        time.sleep(0.5)


def _resolve(host: str, port: int, seconds: float) -> tuple[int, Any]:
    """Return the address family and address of a host."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return family, address
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise UserError(f"--rdzv = {host}:{port}: the host is not known: {reason}") from error
        time.sleep(1)

"""Find a host by its name and wait until it accepts connections; errors are one line, where torch prints tracebacks."""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

from megatron_gkd.errors import UserError

NAMED_WITHIN_S = 60.0  # some clusters publish a node's name only once it runs
REACHED_WITHIN_S = 600.0
_REPORTED_AFTER_S = 10.0


def resolve(host: str, port: int, key: str, seconds: float) -> tuple[int, Any]:
    """Return the address family and address of a host.

    Args:
        host: its name or address.
        port: of the service there.
        key: what names the host, with its value, for messages.
        seconds: how long the name may be unknown.

    Raises:
        UserError: the name is unknown.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return family, address
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or error
                raise UserError(f"{key}: the host is not known: {reason}") from error
        time.sleep(min(1.0, seconds))


def wait_for_port(host: str, port: int, key: str, what: str, seconds: float) -> None:
    """Wait until a host accepts connections.

    Args:
        host: its name or address.
        port: the port.
        key: what names both, with the value, for messages.
        what: the service there, for messages.
        seconds: how long it may not.

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
                raise UserError(f"{key}: cannot be reached for {seconds:g} s: {reason}") from error
        if waited > _REPORTED_AFTER_S and not is_reported:
            is_reported = True
            print(f"waiting for {what} at {host}:{port}", file=sys.stderr, flush=True)
        time.sleep(0.5)

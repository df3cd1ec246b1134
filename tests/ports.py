"""Ports for tests that start servers."""

import random
import socket

_PORTS = range(20000, 30000)
"""Linux gives none of them to clients or to servers that leave the choice to it (ip_local_port_range)."""


def free_port() -> int:
    """Return a port at which nothing listens, and which other tests hardly take before it is used."""
    generator = random.SystemRandom()  # not the seed of the tests, which other processes have too
    while True:
        port = generator.choice(_PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError:
                continue
            return port

"""Recognize the error of a rank that has lost its connection to another one, which has ended."""

from __future__ import annotations

import re

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|connection to rank \d+ is lost|connection was closed|broken pipe"
    r"|remote process (exited|has)|failed to (recv|send)|recvValue failed|sendBytes failed|communicator was aborted"
    r"|^\w*(DistBackendError|DistNetworkError|DistStoreError)\b|DistNetworkError|DistStoreError|socket timeout",
    re.IGNORECASE,
)


def is_of_lost_peer(message: str) -> bool:
    """Return whether the type and text of an unexpected error are those of a lost connection to another rank.

    A GkdError is none of them: what it says of a connection is about a server.
    """
    return _LOST_PEER.search(message) is not None

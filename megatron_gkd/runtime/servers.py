"""HTTP servers that a run depends on: one exchange with them, and how long to bear with one that fails."""

from __future__ import annotations

import random
import time
from typing import Any, ClassVar

import httpx

from megatron_gkd.errors import UserError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_SHOWN = 500  # characters of a server's error message
_MAY_PASS = (408, 429)  # beside 5xx: too slow, too many requests


class ServerDown(Exception):
    """An exchange with a server failed in a way that may pass: no connection, no answer in time, or a status of 5xx."""


class Patience:
    """The pauses between the attempts at one task; they grow, and end `seconds` after its first failure."""

    key: ClassVar[str]
    """The recipe's key that has these seconds."""

    def __init__(self, seconds: float):
        self.seconds, self._deadline, self._pause = seconds, None, _FIRST_PAUSE

    def wait(self, error: ServerDown) -> None:
        """Until the next attempt. UserError if there is to be none."""
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.seconds
        if now + self._pause > self._deadline:
            raise UserError(
                f"{error}; that was so for {self.seconds:g} s ({self.key}). Look into the server's log, "
                "start it again, and then the run"
            ) from error
        time.sleep(self._pause * random.uniform(0.5, 1))  # not all at the same time
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def open_client(timeout: float, connections: int) -> httpx.Client:
    """For all servers and threads of a rank. `timeout`: seconds that one answer may take; `connections`: kept open."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)
    # Servers are named by address: no proxy of the environment is asked.
    return httpx.Client(timeout=httpx.Timeout(timeout, connect=10.0), limits=limits, trust_env=False)


def exchange(http: httpx.Client, method: str, url: str, *, hint: str = "", **options: Any) -> bytes:
    """One request and its answer's content. `hint` is what to do if the server does not know the path.

    Raises:
        ServerDown: it failed in a way that may pass.
        UserError: the server refuses it.
    """
    try:
        response = http.request(method, url, **options)
    except httpx.TransportError as error:
        raise ServerDown(f"{url}: {type(error).__name__}: {error}") from error
    if not response.is_error:
        return response.content
    text = f"{url}: {response.status_code}: {response.text[:_SHOWN]}"
    if response.status_code >= 500 or response.status_code in _MAY_PASS:
        raise ServerDown(text)
    raise UserError(f"{text}; {hint}" if hint and response.status_code == 404 else text)

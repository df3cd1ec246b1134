"""Client of the vLLM servers that a run depends on: requests, typed responses, and retries.

The clients of rollout servers and of teacher servers derive from `Server`, so that both refuse the same responses.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import httpx
import msgspec

from megatron_gkd.errors import ServiceError, UserError

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_SHOWN = 500  # characters of a server's error message
_RETRIABLE = (408, 429)  # beside 5xx: timeout, too many requests

T = TypeVar("T")


class ServerDown(Exception):
    """A request failed and may succeed later: no connection, no response in time, or a status of 5xx, 408 or 429."""


class RouteMissing(UserError):
    """The server has no such route (404), or was started without it (403)."""


class Backoff:
    """Growing pauses between the attempts at one task, until `seconds` after its first failure.

    Attributes:
        key: the recipe's key that has these seconds.
    """

    key: ClassVar[str]

    def __init__(self, seconds: float) -> None:
        self.seconds, self._pause = seconds, _FIRST_PAUSE
        self._deadline: float | None = None

    def wait(self, error: ServerDown) -> None:
        """Wait until the next attempt.

        Raises:
            ServiceError: the time is up; its cause is `error`.
        """
        now = time.monotonic()
        if self._deadline is None:
            self._deadline = now + self.seconds
        if now + self._pause > self._deadline:
            raise ServiceError(
                f"{error}; all attempts failed for {self.seconds:g} s ({self.key}). Look into the server's log, "
                "start it again, and then the run"
            ) from error
        time.sleep(self._pause * random.uniform(0.5, 1))  # not all at the same time
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def open_client(timeout: float, connections: int) -> httpx.Client:
    """Return an HTTP client for all servers and threads of a rank.

    Args:
        timeout: seconds that one response may take.
        connections: number of idle connections that are kept open.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)
    # Servers are named by address: the environment's proxies are not used.
    return httpx.Client(timeout=httpx.Timeout(timeout, connect=10.0), limits=limits, trust_env=False)


def exchange(http: httpx.Client, method: str, url: str, *, hint: str = "", **options: Any) -> bytes:
    """Send one request and return the content of the response.

    Args:
        http: from `open_client`.
        method: of HTTP.
        url: of the request.
        hint: what to do if the server lacks the path.
        **options: of `httpx.Client.request`.

    Raises:
        ServerDown: it failed and may succeed later.
        RouteMissing: the server lacks the path.
        UserError: the server refuses it, or the response is not valid HTTP.
    """
    try:
        response = http.request(method, url, **options)
    except httpx.TransportError as error:
        raise ServerDown(f"{url}: {type(error).__name__}: {error}") from error
    except (httpx.RequestError, httpx.InvalidURL) as error:  # a response that can't be decompressed; a bad address
        raise UserError(f"{url}: {type(error).__name__}: {error}; expected a response of a vLLM server") from error
    if response.is_success:
        return response.content
    text = f"{url}: {response.status_code}: {' '.join(response.text[:_SHOWN].split())}"
    if response.status_code >= 500 or response.status_code in _RETRIABLE:
        raise ServerDown(text)
    if response.status_code in (403, 404):
        raise RouteMissing(f"{text}; {hint}" if hint else text)
    raise UserError(text)


def decode(content: bytes, kind: type[T] | msgspec.json.Decoder[T], url: str) -> T:
    """Return a response's content as `kind`. Fields that `kind` lacks are ignored.

    Raises:
        UserError: it is no JSON, or not of this kind.
    """
    decoder = kind if isinstance(kind, msgspec.json.Decoder) else msgspec.json.Decoder(kind)
    try:
        return decoder.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{url}: the response is not that of a vLLM server ({error}): {content[:_SHOWN]!r}; expected the JSON of "
            "vLLM's route of this name: check the address and what listens there"
        ) from error


@dataclass(frozen=True)
class ServedModel:
    """The model that a server serves: its name, and the longest sequence in tokens, prompt and completion together."""

    max_model_len: int
    name: str


class _Card(msgspec.Struct):
    """An entry of the list of models: a model, or adapters of the one that is their parent."""

    id: str
    max_model_len: int | None = None
    parent: str | None = None


class _Models(msgspec.Struct):
    data: Annotated[list[_Card], msgspec.Meta(min_length=1)]


class _Paused(msgspec.Struct):
    is_paused: bool


class Server:
    """One vLLM server. `http` may be shared between servers and threads.

    All methods raise ServerDown for a failure that may succeed later, and UserError, in one line that begins with the
    address, for a response that the server will always give or that is not a vLLM server's.
    """

    def __init__(self, url: str, http: httpx.Client) -> None:
        self.url = url.rstrip("/")
        self._http = http

    def request(
        self, method: str, path: str, kind: type[T] | msgspec.json.Decoder[T], *, hint: str = "", **options: Any
    ) -> T:
        """Send one request and return its response as `kind`. `hint` is what to do if the server lacks `path`."""
        url = self.url + path
        return decode(exchange(self._http, method, url, hint=hint, **options), kind, url)

    def command(self, path: str, *, hint: str = "", **options: Any) -> None:
        """POST to a route whose response, a JSON object or no content, is not needed."""
        content = exchange(self._http, "POST", self.url + path, hint=hint, **options)
        if content:
            decode(content, dict, self.url + path)

    def served_model(self) -> ServedModel:
        """Return the first model that the server lists."""
        first = self._cards()[0]
        if first.max_model_len is None:
            raise UserError(
                f"{self.url}/v1/models: {first.id} has no max_model_len; check that a vLLM server listens there"
            )
        return ServedModel(first.max_model_len, first.id)

    def served_adapters(self) -> list[str]:
        """Return the names of all adapters that the server has."""
        return [card.id for card in self._cards() if card.parent is not None]

    def _cards(self) -> list[_Card]:
        return self.request("GET", "/v1/models", _Models, hint="check that a vLLM server listens there").data

    def require_running(self) -> None:
        """Raise UserError if generation is paused: requests would wait without an end.

        Only a server in vLLM's development mode can be paused, and it alone has the route.
        """
        try:
            paused = self.request("GET", "/is_paused", _Paused).is_paused
        except RouteMissing:
            return
        if paused:
            raise UserError(f"{self.url}: generation is paused; resume it (POST /resume) or restart the server")

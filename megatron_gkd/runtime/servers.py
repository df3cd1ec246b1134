"""Client of the vLLM servers that a run depends on: requests, typed responses, and retries.

The clients of rollout servers and of teacher servers derive from `Server`, so that both refuse the same responses.
"""

from __future__ import annotations

import random
import ssl
import threading
import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

import httpx
import msgspec

from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.runtime.current_phase import note_progress

_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0
_SHOWN = 500  # characters of a server's error message
_AUTHORIZATION, _BEARER = "Authorization", "Bearer "
_RETRIABLE = (408, 429)  # beside 5xx: timeout, too many requests
_building_decoder = threading.Lock()

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
        note_progress()  # the wait has a limit of its own
        time.sleep(self._pause * random.uniform(0.5, 1))  # not all at the same time
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


def open_client(timeout: float, connections: int, api_key: str | None = None) -> httpx.Client:
    """Return an HTTP client for all servers and threads of a rank.

    Args:
        timeout: seconds that one response may take.
        connections: number of idle connections that are kept open.
        api_key: sent with every request; None for servers without one.

    Raises:
        UserError: the certificates that the environment names can't be read.
    """
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)
    headers = {} if api_key is None else {_AUTHORIZATION: _BEARER + api_key}
    try:
        certificates = httpx.create_ssl_context()  # with those of SSL_CERT_FILE and SSL_CERT_DIR
    except OSError as error:
        raise UserError(
            f"SSL_CERT_FILE, SSL_CERT_DIR: the certificates that they name can't be read ({error})"
        ) from error
    # Servers are named by address: the environment's proxies are not used.
    return httpx.Client(
        timeout=httpx.Timeout(timeout, connect=10.0),
        limits=limits,
        headers=headers,
        verify=certificates,
        trust_env=False,
    )


def exchange(
    http: httpx.Client, method: str, url: str, *, hint: str = "", api_key_env: str = "", **options: Any
) -> bytes:
    """Send one request and return the content of the response.

    Args:
        http: from `open_client`.
        method: of HTTP.
        url: of the request.
        hint: what to do if the server lacks the path.
        api_key_env: the recipe's key that names the variable with the API key.
        **options: of `httpx.Client.request`.

    Raises:
        ServerDown: it failed and may succeed later.
        RouteMissing: the server lacks the path.
        UserError: the server refuses it, its certificate is not valid, or the response is not valid HTTP.
    """
    try:
        response = http.request(method, url, **options)
    except httpx.TransportError as error:
        text = f"{url}: {type(error).__name__}: {error}"
        if remedy := _remedy_of_tls(error):
            raise UserError(f"{text}; {remedy}") from error
        raise ServerDown(text) from error
    except (httpx.RequestError, httpx.InvalidURL) as error:  # a response that can't be decompressed; a bad address
        raise UserError(f"{url}: {type(error).__name__}: {error}; expected a response of a vLLM server") from error
    if response.is_success:
        note_progress()
        return response.content
    text = f"{url}: {response.status_code}: {_shown_text(http, response)}"
    if response.status_code >= 500 or response.status_code in _RETRIABLE:
        raise ServerDown(text)
    if response.status_code in (401, 403):
        remedy = _remedy_of_api_key(http, api_key_env)
        if response.status_code == 401:
            raise UserError(f"{text}; {remedy}")
        raise RouteMissing(f"{text}; {hint}; or {remedy}" if hint else f"{text}; {remedy}")
    if response.status_code == 404:
        raise RouteMissing(f"{text}; {hint}" if hint else text)
    raise UserError(text)


def _remedy_of_tls(error: BaseException) -> str | None:
    """Return what to do about an encrypted connection that never can be made; None for other failures."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            "name the file of the authority that has signed its certificate in SSL_CERT_FILE, or use its http address"
        )
    if cause is not None and cause.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE"):
        return "no encrypted connection is served there: use its http address"
    return None


def _remedy_of_api_key(http: httpx.Client, api_key_env: str) -> str:
    """Return what to do where a server refuses the API key, or the lack of one."""
    key = api_key_env or "the recipe's key for it"
    if _AUTHORIZATION in http.headers:
        return f"the server refuses the API key in the environment variable that {key} names: correct it"
    return f"the server needs an API key: set {key} to the name of an environment variable that holds it"


def _shown_text(http: httpx.Client, response: httpx.Response) -> str:
    """Return the start of a response in one line, without the API key, which some servers repeat."""
    api_key = http.headers.get(_AUTHORIZATION, "").removeprefix(_BEARER)
    text = response.text.replace(api_key, "***") if api_key else response.text
    return " ".join(text[:_SHOWN].split())


def decode(content: bytes, kind: type[T] | msgspec.json.Decoder[T], url: str) -> T:
    """Return a response's content as `kind`. Fields that `kind` lacks are ignored.

    Raises:
        UserError: it is no JSON, or not of this kind.
    """
    try:
        return _decoder_of(kind).decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{url}: the response is not that of a vLLM server ({error}): {content[:_SHOWN]!r}; expected the JSON of "
            "vLLM's route of this name: check the address and what listens there"
        ) from error


def _decoder_of(kind: type[T] | msgspec.json.Decoder[T]) -> msgspec.json.Decoder[T]:
    if isinstance(kind, msgspec.json.Decoder):
        return kind
    # msgspec 0.22.0 ends the process with a segmentation fault when two threads build the first decoders of a Struct.
    with _building_decoder:
        return msgspec.json.Decoder(kind)


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

    Attributes:
        api_key_env: the recipe's key that names the variable with the API key of such servers.

    All methods raise ServerDown for a failure that may succeed later, and UserError, in one line that begins with the
    address, for a response that the server will always give or that is not a vLLM server's.
    """

    api_key_env: ClassVar[str] = ""

    def __init__(self, url: str, http: httpx.Client) -> None:
        self.url = url.rstrip("/")
        self._http = http

    def request(
        self, method: str, path: str, kind: type[T] | msgspec.json.Decoder[T], *, hint: str = "", **options: Any
    ) -> T:
        """Send one request and return its response as `kind`. `hint` is what to do if the server lacks `path`."""
        return decode(self.exchange(method, path, hint=hint, **options), kind, self.url + path)

    def command(self, path: str, *, hint: str = "", **options: Any) -> None:
        """POST to a route whose response, a JSON object or no content, is not needed."""
        content = self.exchange("POST", path, hint=hint, **options)
        if content:
            decode(content, dict, self.url + path)

    def exchange(self, method: str, path: str, *, hint: str = "", **options: Any) -> bytes:
        """Send one request and return the content of its response, whatever it is."""
        url = self.url + path
        return exchange(self._http, method, url, hint=hint, api_key_env=self.api_key_env, **options)

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

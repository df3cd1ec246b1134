"""Files behind URLs: http and https by httpx, others by fsspec where the filesystem of their scheme is installed."""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import fsspec
import httpx

from megatron_gkd.data.sources.files import DataFile, reason_of
from megatron_gkd.errors import UserError

_TIMEOUT_S = 60.0
_CONNECTION_RETRIES = 2


def describe_url(url: str) -> list[Any]:
    """Return what changes when the files behind a URL do.

    Raises:
        UserError: they cannot be reached.
    """
    try:
        if _is_http(url):
            return [url, *_head(url)]
        filesystem, paths = _find(url)
        return [[path, filesystem.ukey(path)] for path in paths]
    except Exception as error:  # of the filesystem's library or the network
        raise _unreachable(url, error) from error


def fetch_url(url: str, scratch: Path) -> list[DataFile]:
    """Copy the files behind a URL, which may be a pattern where its filesystem can list folders.

    Args:
        url: of the files.
        scratch: an own folder for the copies.

    Raises:
        UserError: a file cannot be fetched.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        if _is_http(url):
            return [DataFile(url, _download(url, scratch / (PurePosixPath(urlsplit(url).path).name or "data")))]
        filesystem, paths = _find(url)
        copies = []
        for index, path in enumerate(paths):
            copy = scratch / f"{index:06}-{PurePosixPath(path).name}"
            with filesystem.open(path, "rb") as source, open(copy, "wb") as file:
                shutil.copyfileobj(source, file)
            copies.append(DataFile(filesystem.unstrip_protocol(path) if len(paths) > 1 else url, copy))
        return copies
    except Exception as error:
        raise _unreachable(url, error) from error


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _unreachable(url: str, error: Exception) -> UserError:
    scheme = url.partition("://")[0]
    if isinstance(error, ImportError):
        return UserError(f"{url}: fsspec's filesystem for {scheme}:// is not installed: {error}")
    return UserError(f"{url}: cannot be fetched: {type(error).__name__}: {reason_of(error)}")


def _find(url: str) -> tuple[Any, list[str]]:
    filesystem, path = fsspec.core.url_to_fs(url)
    if not any(character in path for character in "*?["):
        filesystem.info(path)  # raises FileNotFoundError
        return filesystem, [path]
    paths = sorted(filesystem.glob(path))
    if not paths:
        raise FileNotFoundError("no file matches the pattern")
    return filesystem, paths


def _client() -> httpx.Client:
    transport = httpx.HTTPTransport(retries=_CONNECTION_RETRIES)
    return httpx.Client(transport=transport, timeout=_TIMEOUT_S, follow_redirects=True)


def _head(url: str) -> list[str | None]:
    """Return the tag, the time of change and the length of a file; Nones where a server does not answer HEAD."""
    with _client() as client:
        response = client.head(url)
    if response.status_code in (403, 405, 501):  # addresses that are signed for GET refuse HEAD
        return [None] * 3
    _require_success(response)
    return [response.headers.get(name) for name in ("etag", "last-modified", "content-length")]


def _download(url: str, target: Path) -> Path:
    with _client() as client, client.stream("GET", url) as response, open(target, "wb") as file:
        _require_success(response)
        for chunk in response.iter_bytes():
            file.write(chunk)
    return target


def _require_success(response: httpx.Response) -> None:
    if not response.is_success:
        raise OSError(f"the server responds {response.status_code} {response.reason_phrase}")

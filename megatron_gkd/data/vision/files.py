"""Image files: what is read of them when rows are tokenized, and their pixels."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import httpx
import PIL.Image
import PIL.ImageOps

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.vision.image import Image
from megatron_gkd.errors import UserError
from megatron_gkd.runtime.disk import publish

UNREADABLE = "unreadable image"  # why a row is bad
FETCH_TIMEOUT_S = 30.0
FETCH_PAUSES_S = (1.0, 4.0)  # before a second and a third attempt
_ORIENTATION = 0x0112  # the EXIF tag
_LONGEST_SHOWN = 80  # characters of a reference in messages: a data URI holds the whole image


@dataclass(frozen=True)
class ImageStore:
    """Find the images that rows refer to.

    Attributes:
        base: folder to which paths of images are relative: that of the data file.
        cache: folder for images that are not files yet (URLs, data URIs, bytes); None: there can be none.
    """

    base: Path
    cache: Path | None = None

    def resolve(self, reference: str | bytes) -> Image:
        """Return the image of a reference, with an absolute path as its location.

        Args:
            reference: path, `file://`, `http://` or `https://` URL, `data:` URI, or the encoded image itself.

        Raises:
            BadRow: "unreadable image".
        """
        path, content = self.read(reference, _read_size)
        height, width = _read_size(content, show(reference))
        return Image(str(path), height, width, hashlib.sha256(content).hexdigest())

    def read(self, reference: str | bytes, check: Callable[[bytes, str], object]) -> tuple[Path, bytes]:
        """Return the absolute path and the content of a reference's file.

        Args:
            reference: as `resolve` takes it.
            check: raises a BadRow for what is not to be stored; called with a content and the reference for messages.

        Raises:
            BadRow: "unreadable image".
        """
        shown = show(reference)
        try:
            path = self._find(reference, shown, check)
            return path, _read(path, shown)
        except (ValueError, RuntimeError) as error:  # a null character, half of a surrogate pair, an unknown user
            raise BadRow(UNREADABLE, f"{shown}: {error}") from error

    def _find(self, reference: str | bytes, shown: str, check: Callable[[bytes, str], object]) -> Path:
        """Return the file of a reference, which is stored if it is none yet."""
        if isinstance(reference, bytes):
            return self._store(hashlib.sha256(reference).hexdigest(), lambda: reference, shown, check)
        if reference.startswith("data:"):
            content = _decode_data_uri(reference, shown)
            return self._store(hashlib.sha256(content).hexdigest(), lambda: content, shown, check)
        if reference.startswith(("http://", "https://")):
            name = "url-" + hashlib.sha256(reference.encode()).hexdigest()
            return self._store(name, lambda: _fetch(reference, shown), shown, check)
        text = unquote(urlsplit(reference).path) if reference.startswith("file://") else reference
        return Path(os.path.abspath(self.base / Path(text).expanduser()))

    def _store(
        self, name: str, content: Callable[[], bytes], shown: str, check: Callable[[bytes, str], object]
    ) -> Path:
        """Return the file `name` of the cache, with this content; it is written once."""
        if self.cache is None:
            raise BadRow(UNREADABLE, f"{shown}: there is no folder to store it in")
        path = self.cache / name[-2:] / name
        if not path.exists():
            encoded = content()
            check(encoded, shown)  # what is no image is not kept: it may be another the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, unfinished = tempfile.mkstemp(dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(encoded)
            os.chmod(unfinished, 0o644)  # mkstemp gives 0600; a shared cache is for every user of the machine
            publish(Path(unfinished), path)
        return path


def read_encoded(image: Image) -> bytes:
    """Read the encoded bytes of an image.

    Raises:
        UserError: it cannot be read, or is not the one that was tokenized.
    """
    try:
        content = Path(image.location).read_bytes()
    except OSError as error:
        raise UserError(
            f"{image.location}: {error.strerror or error}; it was there when the rows were tokenized"
        ) from error
    if hashlib.sha256(content).hexdigest() != image.digest:
        raise UserError(
            f"{image.location}: the image has changed since the rows were tokenized; change the time of the data file "
            "(touch) to tokenize them again"
        )
    return content


def load_image(image: Image) -> PIL.Image.Image:
    """Decode an image, upright and in RGB.

    Raises:
        UserError: it cannot be read, or is not the one that was tokenized.
    """
    content = read_encoded(image)
    try:
        with PIL.Image.open(io.BytesIO(content)) as opened:
            decoded: Any = PIL.ImageOps.exif_transpose(opened)
            return decoded.convert("RGB")
    except Exception as error:  # Pillow's decoders raise many kinds of error for a damaged file
        raise UserError(f"{image.location}: cannot be decoded: {error}") from error


def _read(path: Path, shown: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRow(UNREADABLE, f"{shown}: {error.strerror or error}") from error


def _read_size(content: bytes, shown: str) -> tuple[int, int]:
    """Return the height and width of an upright image, once it is decoded: a truncated file has a header, too."""
    try:
        with PIL.Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            is_turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
            image.draft(None, (1, 1))  # a JPEG is decoded at an eighth of its size, which takes a quarter of the time
            image.load()
    except PIL.UnidentifiedImageError as error:  # its text has an address in memory
        raise BadRow(UNREADABLE, f"{shown}: not an image of a kind that Pillow reads") from error
    except Exception as error:  # Pillow's decoders raise many kinds of error for a damaged file
        raise BadRow(UNREADABLE, f"{shown}: not an image: {error}") from error
    return (width, height) if is_turned else (height, width)


def _decode_data_uri(uri: str, shown: str) -> bytes:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise BadRow(UNREADABLE, f"{shown}: a data URI is data:image/png;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(payload)
    try:
        return base64.b64decode(unquote(payload), validate=True)
    except ValueError as error:
        raise BadRow(UNREADABLE, f"{shown}: not base64: {error}") from error


def _fetch(url: str, shown: str) -> bytes:
    """Return the content of a URL, after a few attempts where another one may succeed."""
    for pause in (*FETCH_PAUSES_S, None):
        try:
            response = httpx.get(url, timeout=FETCH_TIMEOUT_S, follow_redirects=True)
            response.raise_for_status()
            return response.content
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            if pause is None or not _may_pass(error):
                reason = str(error).partition("\n")[0] or type(error).__name__
                raise BadRow(UNREADABLE, f"{shown}: cannot be fetched: {reason}") from error
        time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _may_pass(error: Exception) -> bool:
    """Return whether a request may succeed a little later: the server is busy, or the connection was lost."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def show(reference: str | bytes) -> str:
    """Return a reference for messages."""
    if isinstance(reference, bytes):
        return f"a file of {len(reference)} bytes"
    shown = reference if len(reference) <= _LONGEST_SHOWN else reference[:_LONGEST_SHOWN] + "..."
    return shown.encode(errors="backslashreplace").decode()  # JSON can hold half a surrogate pair

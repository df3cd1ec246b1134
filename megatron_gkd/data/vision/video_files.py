"""Video files: what is read of them when rows are tokenized, and their frames.

Pillow decodes animated images (GIF, WebP, APNG), and the package av all others. A list of images needs neither.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.vision.files import ImageStore, load_image, read_encoded, show
from megatron_gkd.data.vision.image import Image, Video
from megatron_gkd.errors import UserError

UNREADABLE = "unreadable video"  # why a row is bad
LIST_FPS = 2.0  # frames per second of a list of frames whose row does not say it
_ANIMATION_FPS = 10.0  # of an animated image without durations


@dataclass(frozen=True)
class VideoReference:
    """A video as a row names it.

    Attributes:
        source: of a file: path, URL, data URI or the encoded video; or the images that are its frames, all of which are
            read.
        fps: frames to read per second of a file (None: as the processor says), or that a list of frames has.
        max_frames: most frames to read of a file; None: as the processor says.
    """

    source: str | bytes | tuple[str | bytes, ...]
    fps: float | None = None
    max_frames: int | None = None


@dataclass(frozen=True)
class _Header:
    """What a file says of its frames."""

    num_frames: int
    fps: float
    height: int
    width: int


Sampler = Callable[[int, float, VideoReference], Sequence[int]]
"""Return the frames to read, by the number of all, their number per second, and the row's reference."""


def resolve_video(store: ImageStore, reference: VideoReference, sample: Sampler) -> Video:
    """Return the video of a reference, with an absolute path as its location.

    Args:
        store: finds files.
        reference: of a row.
        sample: selects the frames to read of a file.

    Raises:
        BadRow: "unreadable image" or "unreadable video".
    """
    source = reference.source
    if isinstance(source, tuple):
        return _of_frames([store.resolve(frame) for frame in source], reference.fps or LIST_FPS)
    shown = show(source)
    path, content = store.read(source, _read_header)
    header = _read_header(content, shown)
    try:
        frames = tuple(int(index) for index in sample(header.num_frames, header.fps, reference))
    except ValueError as error:
        raise BadRow(UNREADABLE, f"{shown}: {error}") from error
    digest = _hash([hashlib.sha256(content).hexdigest()], frames, header.fps)
    return Video(str(path), header.height, header.width, digest, frames, header.fps, header.num_frames)


def _of_frames(images: Sequence[Image], fps: float) -> Video:
    sizes = sorted({(image.height, image.width) for image in images})
    if len(sizes) > 1:
        named = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise BadRow(UNREADABLE, f"{images[0].location}: the frames have several sizes: {named}")
    frames = tuple(range(len(images)))
    digest = _hash([image.digest for image in images], frames, fps)
    first = images[0]
    files = tuple(image.location for image in images)
    return Video(first.location, first.height, first.width, digest, frames, fps, len(images), files)


def require_readable(image: Image) -> None:
    """Read an image, or the files of a video, without decoding them.

    Raises:
        UserError: they cannot be read, or are not those that were tokenized.
    """
    if isinstance(image, Video):
        _read(image)
    else:
        read_encoded(image)


def load_frames(video: Video) -> np.ndarray:
    """Decode the frames that are read, uint8 [frames, height, width, 3].

    Raises:
        UserError: they cannot be read, or are not those that were tokenized.
    """
    contents = _read(video)
    if video.files:
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        images = [
            Image(file, video.height, video.width, digest) for file, digest in zip(video.files, digests, strict=True)
        ]
        return np.stack([np.asarray(load_image(image)) for image in images])
    wanted = set(video.frames)
    try:
        with _open_frames(contents[0]) as opened:
            found = {index: np.asarray(decode()) for index, decode in enumerate(opened.frames) if index in wanted}
    except Exception as error:  # decoders raise many kinds of error for a damaged file
        raise UserError(f"{video.location}: cannot be decoded: {error}") from error
    return np.stack([found[index] for index in video.frames])


def _read(video: Video) -> list[bytes]:
    """Return the contents of a video's files.

    Raises:
        UserError: see `load_frames`.
    """
    try:
        contents = [Path(file).read_bytes() for file in video.files or (video.location,)]
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror or error}; it was there when the rows were tokenized"
        ) from error
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    if _hash(digests, video.frames, video.fps) != video.digest:
        raise UserError(
            f"{video.location}: the video has changed since the rows were tokenized; change the time of the data file "
            "(touch) to tokenize them again"
        )
    return contents


@dataclass(frozen=True)
class _Opened:
    """An open video.

    Attributes:
        frames: a function for each frame, in order, that decodes it to RGB. It is called before the next is read.
        fps: frames per second; None: that of the durations of the frames.
        durations: of the frames that were read so far, in milliseconds; filled where there is no `fps`.
    """

    frames: Iterator[Callable[[], Any]]
    fps: float | None
    durations: list[float]


def _read_header(content: bytes, shown: str) -> _Header:
    """Read the number, rate and size of frames.

    Raises:
        BadRow: "unreadable video".
    """
    try:
        with _open_frames(content) as opened:
            number, size = 0, (0, 0)
            for number, decode in enumerate(opened.frames, 1):
                if number == 1:
                    size = np.asarray(decode()).shape[:2]
            seconds = sum(opened.durations) / 1000
    except Exception as error:  # decoders raise many kinds of error for a damaged file
        raise BadRow(UNREADABLE, f"{shown}: {error}") from error
    if not number:
        raise BadRow(UNREADABLE, f"{shown}: it has no frames")
    return _Header(number, opened.fps or (number / seconds if seconds else _ANIMATION_FPS), *size)


@contextmanager
def _open_frames(content: bytes) -> Iterator[_Opened]:
    try:
        image = PIL.Image.open(io.BytesIO(content))
    except PIL.UnidentifiedImageError:
        with _open_av(content) as opened:
            yield opened
    else:
        with image:
            durations: list[float] = []
            yield _Opened(_animation(image, durations), None, durations)


def _animation(image: Any, durations: list[float]) -> Iterator[Callable[[], Any]]:
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        image.load()  # some formats know the duration only then
        durations.append(float(image.info.get("duration", 0)))
        yield lambda: image.convert("RGB")


@contextmanager
def _open_av(content: bytes) -> Iterator[_Opened]:
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        raise ValueError(
            "it is no animated image, and other videos need the package av (pip install av); or write a list of frames"
        ) from error
    with av.open(io.BytesIO(content)) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        frames = (partial(frame.to_ndarray, format="rgb24") for frame in container.decode(stream))
        yield _Opened(frames, float(rate) if rate else LIST_FPS, [])


def _hash(contents: Sequence[str], frames: Sequence[int], fps: float) -> str:
    """Hash the digests of the files of a video, and which of its frames are read."""
    return hashlib.sha256(json.dumps([*contents, list(frames), fps]).encode()).hexdigest()

"""References to images and videos. Pixels are decoded where a microbatch needs them, and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Image:
    """An image of a row.

    Attributes:
        location: absolute path of its file; images from URLs and data URIs are stored in files, too.
        height: in pixels, of the upright image.
        width: in pixels.
        digest: SHA-256 of the encoded bytes, in hexadecimal. Two images are the same if their digests are.
    """

    location: str
    height: int
    width: int
    digest: str


@dataclass(frozen=True)
class Video(Image):
    """A video of a row, which stands in order among its images.

    Attributes:
        location: absolute path of its file, or of its first frame where each frame is a file.
        height: of each frame, in pixels.
        width: in pixels.
        digest: SHA-256 of the encoded bytes and of all that says which frames are read.
        frames: indices of the frames that are read, rising.
        fps: frames per second, of all frames: frame i is shown i / fps seconds after the start.
        num_frames: number of all frames.
        files: absolute paths of the frames where each is a file; otherwise empty.
    """

    frames: tuple[int, ...]
    fps: float
    num_frames: int
    files: tuple[str, ...] = ()

    @property
    def sampled_fps(self) -> float:
        """Frames per second of those that are read."""
        return len(self.frames) / self.num_frames * self.fps


def to_record(image: Image) -> dict[str, Any]:
    """Return the values of the columns of tokenized rows; an image has no frames."""
    return {"frames": (), "fps": 0.0, "num_frames": 0, "files": ()} | vars(image)


def from_record(record: dict[str, Any]) -> Image:
    """Return the image or the video of a record. Rows that were stored before there were videos have images alone."""
    image = {name: record[name] for name in ("location", "height", "width", "digest")}
    if not record.get("frames"):
        return Image(**image)
    frames, files = tuple(record["frames"]), tuple(record["files"])
    return Video(**image, frames=frames, fps=record["fps"], num_frames=record["num_frames"], files=files)

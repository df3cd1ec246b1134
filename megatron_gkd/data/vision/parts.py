"""Images and videos in the messages of a row: content parts, or tags (`<image>`, `<video>`) and a column of each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from megatron_gkd.data.bad_row import BadRow, require
from megatron_gkd.data.vision.video_files import VideoReference

Kind = Literal["image", "video"]

WRONG_COUNT = "number of images"  # why a row is bad
MISPLACED = "misplaced image"
VIDEO = "video"
_KINDS: dict[str, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_TAGS: dict[str, Kind] = {"<image>": "image", "<video>": "video"}
_AUDIO = ("audio", "audio_url", "input_audio")
_NO_VIDEOS = "the student reads no videos; models of the kinds Qwen2-VL to Qwen3.5 do"

Reference = str | bytes | VideoReference  # path, URL or data URI; or the encoded image
Content = str | list[dict[str, Any]]  # of a message: text, or parts of which images have no reference any more


@dataclass(frozen=True)
class Slot:
    """The place of an image or a video.

    Attributes:
        kind: which of the two it is.
        reference: None: the next of the row's column.
    """

    kind: Kind
    reference: Reference | None = None


@dataclass(frozen=True)
class Media:
    """What a student reads beside text; tags are text like any other where they stand for nothing that it reads."""

    images: bool = False
    videos: bool = False

    @property
    def tags(self) -> dict[str, Kind]:
        """The tags that stand for something."""
        return {tag: kind for tag, kind in _TAGS.items() if (self.images if kind == "image" else self.videos)}


@dataclass(frozen=True)
class PlacedContent:
    """The content of a message, and the images and videos in it.

    Attributes:
        content: for the chat template: text where there is no image.
        slots: one for each image or video, in order.
    """

    content: Content
    slots: tuple[Slot, ...] = ()


def place_images(content: Any, name: str, media: Media) -> PlacedContent:
    """Find the images and videos of a message's content.

    Args:
        content: text, or a list of parts.
        name: of the content, for messages.
        media: what the student reads.

    Raises:
        BadRow: "wrong type" or "video".
    """
    if not isinstance(require(content, (str, list), name), list):
        content = [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    slots: list[Slot] = []
    for index, part in enumerate(content):
        value = _read_part(part, f"{name}[{index}]", media)
        for found in [value] if isinstance(value, Slot) else _split(value, media.tags):
            if isinstance(found, Slot):
                parts.append({"type": found.kind})
                slots.append(found)
            elif found:
                parts.append({"type": "text", "text": found})
    if not slots:
        return PlacedContent("".join(part["text"] for part in parts))
    return PlacedContent(parts, tuple(slots))


def take_references(
    slots: Sequence[Slot], columns: Mapping[Kind, tuple[str, Sequence[Reference] | None]]
) -> tuple[Reference, ...]:
    """Return a reference for each slot; those without one take the next of their column.

    Args:
        slots: of all contents that the columns are for.
        columns: for each kind, the name of the row's column and its references, None where the row has none.

    Raises:
        BadRow: "number of images".
    """
    rest: dict[Kind, Iterator[Reference]] = {}
    for kind, (name, column) in columns.items():
        column = column or ()
        missing = sum(slot.reference is None and slot.kind == kind for slot in slots)
        if missing != len(column):
            raise BadRow(WRONG_COUNT, f"{missing} times <{kind}> in the texts, but {len(column)} {kind}s in `{name}`")
        rest[kind] = iter(column)
    return tuple(next(rest[slot.kind]) if slot.reference is None else slot.reference for slot in slots)


def read_column(row: dict[str, Any], name: str) -> list[Reference] | None:
    """Return the references of a row's column of images or videos; None where it has none.

    Raises:
        BadRow: "wrong type".
    """
    if name not in row:
        return None
    read = read_video if name == "videos" else _reference
    return [read(item, f"{name}[{index}]") for index, item in enumerate(require(row[name], list, name))]


def kind_of(reference: Reference) -> Kind:
    """Return whether a reference is one of an image or of a video."""
    return "video" if isinstance(reference, VideoReference) else "image"


def refuse_others(row: dict[str, Any], media: Media) -> None:
    """Check that a row has no column of videos that the student does not read, and none of audio.

    Raises:
        BadRow: "video".
    """
    if row.get("videos") and not media.videos:
        raise BadRow(VIDEO, f"videos: {_NO_VIDEOS}")
    if row.get("audios"):
        raise BadRow(VIDEO, "audios: not supported; images and videos are")


def _split(text: str, tags: Mapping[str, Kind]) -> list[str | Slot]:
    """Return the texts between tags, and a slot for each tag."""
    if not tags:
        return [text]
    found = re.split("(" + "|".join(tags) + ")", text)
    return [Slot(tags[item]) if number % 2 else item for number, item in enumerate(found)]


def _read_part(part: Any, name: str, media: Media) -> str | Slot:
    """Return the text of a content part, or the place of its image or video."""
    require(part, dict, name)
    part = {key: value for key, value in part.items() if value is not None}
    kind = require(part.get("type"), str, f"{name}.type")
    if kind == "text":
        text: str = require(part.get("text"), str, f"{name}.text")
        return text
    if kind in _AUDIO:
        raise BadRow(VIDEO, f"{name}: {kind} is not supported; images and videos are")
    if kind not in _KINDS:
        raise BadRow("wrong type", f"{name}.type must be text, image, image_url, video or video_url, but is {kind!r}")
    medium = _KINDS[kind]
    if medium == "video" and not media.videos:
        raise BadRow(VIDEO, f"{name}: {_NO_VIDEOS}")
    keys = [key for key in (medium, f"{medium}_url", "url", "path") if key in part]
    if not keys:
        return Slot(medium)
    value, place = part[keys[0]], f"{name}.{keys[0]}"
    return Slot(medium, read_video(value, place, part) if medium == "video" else _reference(value, place))


def _reference(value: Any, name: str) -> str | bytes:
    if isinstance(value, dict):  # {"url": ...} of the OpenAI form, {"bytes": ..., "path": ...} of tables
        for key in ("bytes", "url", "path"):
            if value.get(key) is not None:
                return _reference(value[key], f"{name}.{key}")
        raise BadRow("wrong type", f"{name} must have one of the keys bytes, url and path")
    return value if isinstance(value, bytes) else require(value, str, name)


def read_video(value: Any, name: str, options: Mapping[str, Any] = MappingProxyType({})) -> VideoReference:
    """Return the reference of a video: one of a file, or a list of the images that are its frames.

    Args:
        value: as the row has it.
        name: of it, for messages.
        options: may have `fps` and `max_frames`.

    Raises:
        BadRow: "wrong type".
    """
    fps, most = options.get("fps"), options.get("max_frames")
    for key, number, kinds in (("fps", fps, (int, float)), ("max_frames", most, (int,))):
        if number is not None and (isinstance(number, bool) or not isinstance(number, kinds) or number <= 0):
            raise BadRow("wrong type", f"{name}: {key} must be a positive number, but is {number!r}")
    if not isinstance(value, list):
        return VideoReference(_reference(value, name), None if fps is None else float(fps), most)
    if not value:
        raise BadRow("wrong type", f"{name} is a list of frames, and is empty")
    if most is not None:
        raise BadRow("wrong type", f"{name}: max_frames is for files; all frames of a list are read")
    frames = tuple(_reference(frame, f"{name}[{index}]") for index, frame in enumerate(value))
    return VideoReference(frames, None if fps is None else float(fps))

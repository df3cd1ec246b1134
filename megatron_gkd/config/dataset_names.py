"""The names of data sets: paths, patterns, URLs, and ids of a hub, each with `#n` for n of its rows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote, urlsplit

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "arrow")  # by the names' endings
COMPRESSIONS = ("gz", "zst", "xz", "bz2")  # of text kinds, as a second ending
ENDINGS = f".{', .'.join(KINDS)}, text kinds also with .{', .'.join(COMPRESSIONS)}"
FORMS = "a file or folder, a pattern (data/*.jsonl), a URL, or a hub id (owner/name[:subset][:split])"

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_HUB = re.compile(r"(?:(HF|MS)::)?([\w.-]+/[\w.-]+)(?::([^:/#]*))?(?::([^#]*))?", re.ASCII)
_UNREADABLE = ("txt", "zip", "tar", "xlsx", "md", "yaml", "pkl", "pt", "npy")  # endings of files, which no id has
_TEXT_KINDS = ("jsonl", "json", "csv", "tsv")
_SIZE = re.compile(r"(.+)#([^#/]*)", re.DOTALL)

NameKind = Literal["path", "pattern", "url", "hub"]


@dataclass(frozen=True)
class DatasetName:
    """A data set as the recipe names it.

    Attributes:
        text: the name without `#n`; also the tag of its rows where `teacher.teacher_tag_key` is `dataset`.
        kind: what it names.
        location: the path, pattern, URL or id alone.
        subset: of a hub's data set, or of a folder that is a copy of one; None: the default. A single part is
            here, although it may be a split, as that of a saved `DatasetDict` is.
        split: None: train.
        size: number of rows to draw; None: all.
        hub: "HF" or "MS" where the id begins with it, which then replaces `student.use_hf`.
    """

    text: str
    kind: NameKind
    location: str
    subset: str | None = None
    split: str | None = None
    size: int | None = None
    hub: str | None = None

    @classmethod
    def parse(cls, text: str, exists: Callable[[str], bool] = os.path.exists) -> DatasetName:
        """Parse a name. A path that exists is one, whatever else it may be read as.

        Args:
            text: the name.
            exists: whether there is a file or folder at a path.

        Raises:
            ValueError: `#` is not followed by a number, or the name has none of the forms. The message is the second
                part of a line that begins with the name.
        """
        if exists(text):
            return cls(text, "path", text)
        name, size = _split_size(text)
        if exists(name):
            return cls(name, "path", name, size=size)
        if name.startswith("file://"):
            return cls(name, "path", unquote(urlsplit(name).path), size=size)
        if _URL.match(name):
            return cls(name, "url", name, size=size)
        if folder := _existing_folder(name, exists):
            return cls(name, "path", *folder, size=size)
        found = _HUB.fullmatch(name)
        if found is not None and not file_ending(found[2]) and not found[2].startswith("."):
            hub, id_, subset, split = found.groups()
            return cls(name, "hub", id_, subset or None, split or None, size, hub)
        return cls(name, "pattern" if re.search(r"[*?\[]", name) else "path", name, size=size)

    @property
    def parts(self) -> list[str]:
        """The parts after the location, as they were written: nothing, the first, or both."""
        return [part for part in (self.subset, self.split) if part is not None]


def file_ending(name: str) -> tuple[str, str] | None:
    """Return the ending of a file's name and its compression ("" for none); None where it has no ending of a file.

    Args:
        name: of the file, or its URL.
    """
    endings = (urlsplit(name).path if _URL.match(name) else name).rpartition("/")[2].lower().split(".")[1:]
    compression = endings.pop() if endings and endings[-1] in COMPRESSIONS else ""
    is_file = bool(compression) or bool(endings and endings[-1] in (*KINDS, *_UNREADABLE))
    return (endings[-1] if endings else "", compression) if is_file else None


def file_kind(name: str) -> tuple[str, str] | None:
    """Return the kind of a data file and its compression ("" for none); None for all other files."""
    kind, compression = file_ending(name) or ("", "")
    return (kind, compression) if kind in (_TEXT_KINDS if compression else KINDS) else None


def without_size(text: str) -> str:
    """Return a name without `#n`, by its text alone."""
    return re.sub(r"#[0-9]+$", "", text)


def _split_size(text: str) -> tuple[str, int | None]:
    found = _SIZE.fullmatch(text)
    if found is None:
        return text, None
    if not re.fullmatch(r"[0-9]+", found[2]) or int(found[2]) == 0:
        raise ValueError(f"#{found[2]} must be a number of rows >= 1 (#500); no file has this name either")
    return found[1], int(found[2])


def _existing_folder(name: str, exists: Callable[[str], bool]) -> tuple[str, str | None, str | None] | None:
    """Return the folder, subset and split of `folder:split` or `folder:subset:split`."""
    for count in (1, 2):
        folder, *parts = name.rsplit(":", count)
        if len(parts) == count and folder and exists(folder):
            return folder, parts[0] or None, (parts[1] or None) if count == 2 else None
    return None

"""The manifest of a teacher cache. This module does not import torch: a recipe is checked before any process starts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = "megatron_gkd teacher cache"
VERSION = 1  # increase it when shards or keys of rows change
FILE = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The properties that all rows of a cache share.

    Attributes:
        k: tokens that are kept of each distribution.
        temperature: that of the tail, the mass of the other tokens (see `ops.topk.TopK`).
        tokenizer: hash of the student's tokenizer (`data.cache.hash_tokenizer`).
        teacher: names of the models or servers that scored.
        vocab_size: ids are below it.
        images: hash of what the student's processor makes of images; None for a text model.
        vocabulary: hash of the bytes of the student's tokens (`models.token_bytes.TokenBytes.digest`); None in caches
            of older releases.
    """

    k: int
    temperature: float
    tokenizer: str
    teacher: str
    vocab_size: int
    images: str | None = None
    vocabulary: str | None = None

    @classmethod
    def read(cls, folder: str | Path) -> Manifest:
        """Read the manifest of a folder.

        Raises:
            ValueError: the folder is no cache of this version; the message is one line.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(f"must be a folder that megatron-gkd score has written; there is no {FILE} in it")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            found = content.pop("format"), content.pop("version")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"its {FILE} is not that of a teacher cache ({error})") from error
        if found != (FORMAT, VERSION):
            raise ValueError(f"its {FILE} is of {found[0]} {found[1]}; must be {FORMAT} {VERSION}: score the rows anew")
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"its {FILE} is not that of a teacher cache ({error})") from error

    def text(self) -> str:
        """Return the content of the file. What is not known is left out, as in caches of older releases."""
        return self._text(asdict(self))

    @staticmethod
    def _text(values: dict[str, Any]) -> str:
        known = {name: value for name, value in values.items() if value is not None}
        return json.dumps({"format": FORMAT, "version": VERSION, **known}, indent=2) + "\n"

    @property
    def identity(self) -> str:
        """32 hex digits that a shard stores of its cache; the vocabulary follows from the tokenizer."""
        text = self._text(asdict(self) | {"vocabulary": None})
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

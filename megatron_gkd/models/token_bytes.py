"""The bytes that each id of a tokenizer decodes to, whatever its vocabulary names them.

A byte-level vocabulary writes " the" as `Ġthe`, one of SentencePiece as `▁the`; a byte that is no text of its own is
one letter of an alphabet of 256 in the former, and `<0xE4>` in the latter.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

Naming = Literal["byte_level", "sentencepiece", "plain"]
"""How a vocabulary names the bytes of its tokens."""

_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"
_MAX_SHOWN = 60  # characters of a token


def name_bytes(name: str | bytes, naming: Naming) -> bytes:
    """Return the bytes of the token that a vocabulary names `name`."""
    if isinstance(name, bytes):  # tiktoken's
        return name
    if naming == "byte_level" and all(letter in _BYTES for letter in name):
        return bytes(_BYTES[letter] for letter in name)
    if naming == "sentencepiece":
        byte = _BYTE.fullmatch(name)
        return bytes([int(byte[1], 16)]) if byte else name.replace(_SPACE, " ").encode()
    return name.encode(errors="surrogatepass")


def possible_bytes(name: str) -> set[bytes]:
    """Return what `name` may stand for in a vocabulary whose naming is unknown."""
    namings: tuple[Naming, ...] = ("byte_level", "sentencepiece", "plain")
    return {name_bytes(name, naming) for naming in namings}


@dataclass(frozen=True)
class TokenBytes:
    """The vocabulary of a tokenizer by its bytes.

    Attributes:
        of_id: bytes of each id.
        added: ids of added tokens, which are their own text.
    """

    of_id: dict[int, bytes]
    added: frozenset[int]

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> TokenBytes:
        """Read the vocabulary of a tokenizer with its added tokens."""
        added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
        names = {index: name for name, index in tokenizer.get_vocab().items() if index not in added}
        naming = find_naming(tokenizer, names.values())
        of_id = {index: name_bytes(name, naming) for index, name in names.items()}
        of_id |= {index: content.encode(errors="surrogatepass") for index, content in added.items()}
        return cls(of_id, frozenset(added))

    def digest(self) -> str:
        """Hash what the ids decode to (32 hex digits): tokenizers with other names for the same bytes have the same."""
        found = hashlib.blake2b(digest_size=16)
        for index in sorted(self.of_id):
            token = self.of_id[index]
            found.update(f"{index} {len(token)} ".encode() + token)
        return found.hexdigest()


def find_naming(tokenizer: PreTrainedTokenizerBase, names: Iterable[str | bytes]) -> Naming:
    """Return how a tokenizer names the bytes of its tokens: as its decoder says, or, without one, as names look.

    Args:
        tokenizer: the tokenizer.
        names: of its tokens, without added ones.
    """
    if tokenizer.is_fast:
        kinds = set(_decoder_kinds(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")))
        if "ByteLevel" in kinds:
            return "byte_level"
        return "sentencepiece" if kinds & {"Metaspace", "ByteFallback"} or _SPACE in kinds else "plain"
    letters = set().union(*(name for name in names if isinstance(name, str)))
    if _SPACE in letters:
        return "sentencepiece"
    return "byte_level" if "Ġ" in letters and letters <= _BYTES.keys() else "plain"


def _decoder_kinds(decoder: dict[str, Any] | None) -> Iterator[str]:
    """Yield the types of a decoder and of its parts, and the text that it replaces by another."""
    if decoder is None:
        return
    yield decoder["type"]
    if decoder["type"] == "Replace":
        yield str(decoder.get("pattern", {}).get("String", ""))
    for part in decoder.get("decoders", ()):
        yield from _decoder_kinds(part)


def show(token: bytes) -> str:
    """Return a token in quotes for a message: text where it is UTF-8, else its bytes; the start of a long one."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return repr(token[:_MAX_SHOWN])
    return repr(text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…")

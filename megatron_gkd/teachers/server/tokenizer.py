"""Comparison of a server's tokenizer with the student's on texts, since vLLM has no route for its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError
from megatron_gkd.models.token_bytes import TokenBytes, possible_bytes, show
from megatron_gkd.models.tokenizer_comparison import PROBES, Difference, text_difference
from megatron_gkd.runtime.servers import Server

MAX_DIFFERENCES = 100
"""Differences of a server's tokenizer after which the comparison ends."""

_MAX_IDS, _IDS_PER_TEXT = 2048, 16


class _Tokens(msgspec.Struct):
    tokens: list[int]
    token_strs: list[str | None]


class _Text(msgspec.Struct):
    prompt: str


@dataclass(frozen=True)
class Probe:
    """A text and its tokens.

    Attributes:
        text: the text.
        ids: of its tokens.
        names: of its tokens in the vocabulary.
        tokens: bytes of its tokens.
    """

    text: str
    ids: list[int]
    names: list[str]
    tokens: list[bytes]


def tokenizer_probes(tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Return plain texts, all added tokens, and texts of up to 2048 others, spread over the vocabulary."""
    vocabulary = TokenBytes.from_tokenizer(tokenizer)
    added = sorted(vocabulary.added)
    others = sorted(vocabulary.of_id.keys() - vocabulary.added)
    spread = others[:: -(-len(others) // _MAX_IDS) or 1]
    groups = [
        chosen[first : first + _IDS_PER_TEXT]
        for chosen in (added, spread)
        for first in range(0, len(chosen), _IDS_PER_TEXT)
    ]
    probes = []
    for text in (*PROBES, *(str(tokenizer.decode(group)) for group in groups)):
        ids = list(tokenizer.encode(text, add_special_tokens=False))
        names = list(tokenizer.convert_ids_to_tokens(ids))
        probes.append(Probe(text, ids, names, [vocabulary.of_id[index] for index in ids]))
    return [probe for probe in probes if probe.ids]


def compare_server(server: Server, model: str, probes: Sequence[Probe]) -> tuple[Difference, ...]:
    """Return the differences of a server's tokenizer from the student's, as far as the probes show them.

    Args:
        server: the server.
        model: as the server lists it.
        probes: of the student's tokenizer.

    Raises:
        ServerDown, UserError: see `Server`.
    """

    def text_of(index: int) -> str | None:
        try:
            return server.request("POST", "/detokenize", _Text, json={"model": model, "tokens": [index]}).prompt
        except UserError:  # it has no such id, or lacks the route
            return None

    found: dict[str, Difference] = {}
    for probe in probes:
        body = {"model": model, "prompt": probe.text, "add_special_tokens": False, "return_token_strs": True}
        hint = "check that a vLLM server listens there"
        response = server.request("POST", "/tokenize", _Tokens, hint=hint, json=body)
        for difference in find_differences(probe, response.tokens, response.token_strs, text_of):
            found[difference.subject] = difference
        if len(found) >= MAX_DIFFERENCES:
            break
    return tuple(found.values())[:MAX_DIFFERENCES]


def find_differences(
    probe: Probe, ids: Sequence[int], names: Sequence[str | None], text_of: Callable[[int], str | None]
) -> Iterator[Difference]:
    """Yield what a server makes of a text otherwise than the student.

    Args:
        probe: the text, and its tokens of the student.
        ids: of the server.
        names: the server's names of these ids.
        text_of: returns the server's text of an id; None where the server can't tell.
    """
    if len(names) != len(ids):
        yield Difference(f"text {show(probe.text.encode())}", f"{len(probe.ids)} tokens", f"{len(names)} names")
    elif list(ids) == probe.ids:
        for index, ours, token, theirs in zip(ids, probe.names, probe.tokens, names, strict=True):
            if theirs != ours and (theirs is None or token not in possible_bytes(theirs)):
                yield Difference(f"id {index}", show(token), repr(theirs))
    else:
        found = list(_differing_ids(probe, text_of))
        yield from found or [text_difference(probe.text, probe.ids, ids)]


def _differing_ids(probe: Probe, text_of: Callable[[int], str | None]) -> Iterator[Difference]:
    """Yield the ids of a text whose own text is another on the server."""
    for index, token in zip(probe.ids, probe.tokens, strict=True):
        theirs = text_of(index)
        if theirs is None or "\ufffd" in theirs:  # the server can't tell, or the bytes are no text of their own
            continue
        ours = token.decode(errors="replace")
        if "\ufffd" not in ours and theirs.strip(" ") != ours.strip(" "):  # SentencePiece drops the first space
            yield Difference(f"id {index}", show(token), show(theirs.encode(errors="surrogatepass")))

"""Comparison of a server's tokenizer with the student's on texts, since vLLM has no route for its vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError
from megatron_gkd.models.vocabulary import PROBES

_MAX_IDS, _IDS_PER_TEXT = 2048, 16


@dataclass(frozen=True)
class Probe:
    """A text, its ids, and their tokens in the vocabulary."""

    text: str
    ids: list[int]
    tokens: list[str]


def tokenizer_probes(tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Return plain texts, all control tokens, and texts of up to 2048 tokens that are spread over the vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().values())
    spread = vocabulary[:: -(-len(vocabulary) // _MAX_IDS)]
    chosen = list(tokenizer.all_special_ids) + spread
    groups = [chosen[first : first + _IDS_PER_TEXT] for first in range(0, len(chosen), _IDS_PER_TEXT)]
    probes = []
    for text in (*PROBES, *(str(tokenizer.decode(group)) for group in groups)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        probes.append(Probe(text, ids, list(tokenizer.convert_ids_to_tokens(ids))))
    return [probe for probe in probes if probe.ids]


def require_same_tokens(probe: Probe, ids: list[int], tokens: list[str | None]) -> None:
    """Check that the server tokenizes the text like the student.

    Args:
        probe: the text, and its ids and tokens of the student.
        ids: of the server.
        tokens: of the server.

    Raises:
        UserError: it does not; the message does not have the server's address.
    """
    if ids != probe.ids:
        shorter = min(len(ids), len(probe.ids))
        index = next((i for i in range(shorter) if ids[i] != probe.ids[i]), shorter)
        theirs, ours = ids[index : index + 4], probe.ids[index : index + 4]
        difference = f"{probe.text!r} has from its token {index} the ids {theirs} there and {ours} here"
    elif len(tokens) != len(ids):
        difference = f"{len(ids)} ids have {len(tokens)} tokens there"
    elif tokens != probe.tokens:
        index = next(i for i, (a, b) in enumerate(zip(tokens, probe.tokens, strict=True)) if a != b)
        difference = f"the id {ids[index]} is {tokens[index]!r} there and {probe.tokens[index]!r} here"
    else:
        return
    raise UserError(
        f"its tokenizer is not the student's: {difference}; their distributions cannot be compared, so start it with a "
        "teacher of the student's family"
    )

"""Whether a server's tokenizer is the student's, by texts: vLLM does not give its vocabulary away."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from megatron_gkd.errors import UserError
from megatron_gkd.models.vocabulary import PROBES

_IDS, _IDS_OF_A_TEXT = 2048, 16


@dataclass(frozen=True)
class Probe:
    """A text, its ids, and the names that they have in the vocabulary."""

    text: str
    ids: list[int]
    tokens: list[str]


def tokenizer_probes(tokenizer: PreTrainedTokenizerBase) -> list[Probe]:
    """Plain texts, all control tokens, and texts of up to 2048 tokens from all over the vocabulary."""
    vocabulary = sorted(tokenizer.get_vocab().values())
    spread = vocabulary[:: -(-len(vocabulary) // _IDS)]
    chosen = list(tokenizer.all_special_ids) + spread
    groups = [chosen[first : first + _IDS_OF_A_TEXT] for first in range(0, len(chosen), _IDS_OF_A_TEXT)]
    probes = []
    for text in (*PROBES, *map(tokenizer.decode, groups)):
        ids = tokenizer.encode(text, add_special_tokens=False)
        probes.append(Probe(text, ids, tokenizer.convert_ids_to_tokens(ids)))
    return [probe for probe in probes if probe.ids]


def require_same_tokens(probe: Probe, ids: list[int], tokens: list[str]) -> None:
    """UserError, without the server's address, if the server makes something else of the text."""
    if ids != probe.ids:
        shorter = min(len(ids), len(probe.ids))
        index = next((i for i in range(shorter) if ids[i] != probe.ids[i]), shorter)
        there, here = ids[index : index + 4], probe.ids[index : index + 4]
        found = f"{probe.text!r} has from its token {index} the ids {there} there and {here} here"
    elif len(tokens) != len(ids):
        found = f"{len(ids)} ids have {len(tokens)} names there"
    elif tokens != probe.tokens:
        index = next(i for i, (a, b) in enumerate(zip(tokens, probe.tokens, strict=True)) if a != b)
        found = f"the id {ids[index]} is {tokens[index]!r} there and {probe.tokens[index]!r} here"
    else:
        return
    raise UserError(
        f"its tokenizer is not the student's: {found}; their distributions cannot be compared, so start it with a "
        "teacher of the student's family"
    )

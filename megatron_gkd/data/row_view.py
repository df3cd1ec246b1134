"""A tokenized row as text, with marks around what is trained on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.sample import IGNORED_LABEL, Sample

START, END = ">>>", "<<<"  # around a text that is trained on
_REPEATS = 8  # equal tokens in a row, as those of an image, that are counted in place of shown


@dataclass(frozen=True)
class Span:
    """Tokens that follow each other, and are all trained on with one weight, or not at all.

    Attributes:
        text: of the tokens.
        num_tokens: their number.
        weight: the factor of their loss; 0 where they are not trained on.
    """

    text: str
    num_tokens: int
    weight: float


def view_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Return a sample's tokens as text, in order."""
    weights = np.zeros(len(sample.input_ids))
    # The label of a position is the token after it.
    weights[1:] = np.where(
        sample.labels == IGNORED_LABEL, 0.0, 1.0 if sample.label_weights is None else sample.label_weights
    )[:-1]
    spans = []
    for weight, group in itertools.groupby(range(len(weights)), key=lambda index: float(weights[index])):
        ids = sample.input_ids[list(group)].tolist()
        spans.append(Span(_decode(ids, tokenizer), len(ids), weight))
    return spans


def mark_spans(spans: Sequence[Span], limit: int | None = None) -> str:
    """Return the text of spans, with marks around those that are trained on, and their weight if it is not 1.

    Args:
        spans: of one sample.
        limit: most characters of a span; the middle of a longer one is left out; None: all are shown.
    """
    return "".join(_mark(span, limit) for span in spans)


def _mark(span: Span, limit: int | None) -> str:
    text = span.text
    if limit is not None and len(text) > limit:
        half = limit // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    if not span.weight:
        return text
    return f"{START}{'' if span.weight == 1 else f'[weight {span.weight:g}] '}{text}{END}"


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    texts: list[str] = []
    pending: list[int] = []
    for token, group in itertools.groupby(ids):
        count = len(list(group))
        if count < _REPEATS:
            pending += [token] * count
            continue
        texts += [_text_of(pending, tokenizer), f"[{count} x {_text_of([token], tokenizer)}]"]
        pending = []
    return "".join([*texts, _text_of(pending, tokenizer)])


def _text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of tokens; control characters, which could change a terminal, as escapes."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return "".join(one if one.isprintable() or one in "\n\t" else one.encode("unicode_escape").decode() for one in text)

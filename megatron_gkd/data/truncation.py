"""Truncation of rows that are longer than `max_length`."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.prompt_frame import Frame
from megatron_gkd.data.sample import IGNORED_LABEL

TruncationStrategy = Literal["delete", "left", "right", "split"]


_NONE = Frame()


def truncate(
    input_ids: np.ndarray, labels: np.ndarray, max_length: int, strategy: TruncationStrategy, frame: Frame = _NONE
) -> tuple[np.ndarray, np.ndarray] | None:
    """Truncate a row to at most `max_length` tokens.

    `delete` returns None for a row that is too long. `right` removes its end. `left` removes tokens between the header
    and the footer of the prompt, which is all before the last response, and then, where that is not enough, the
    response's end. The result may have no label left.

    Args:
        input_ids: int64 [L].
        labels: shifted labels, int64 [L].
        max_length: most tokens.
        strategy: `data.truncation_strategy`.
        frame: of the prompt.
    """
    excess = len(input_ids) - max_length
    if excess <= 0:
        return input_ids, labels
    if strategy == "delete":
        return None
    if strategy == "left":
        removable = prompt_length(labels) - frame.header - frame.footer
        input_ids, labels = remove_tokens(input_ids, labels, frame.header, min(excess, max(0, removable)))
    input_ids, labels = input_ids[:max_length], labels[:max_length].copy()
    labels[-1] = IGNORED_LABEL  # the token that it would predict is gone, or was never there
    return input_ids, labels


def remove_tokens(input_ids: np.ndarray, labels: np.ndarray, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and shifted labels without `count` tokens from position `start` on."""
    removed = slice(start, start + count)
    input_ids, labels = np.delete(input_ids, removed), np.delete(labels, removed)
    if count and start:
        labels[start - 1] = IGNORED_LABEL  # another token follows it now
    return input_ids, labels

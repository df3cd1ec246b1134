"""Truncation of rows that are longer than `max_length`."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_gkd.data.sample import IGNORED_LABEL

TruncationStrategy = Literal["delete", "left", "right"]


def truncate(
    input_ids: np.ndarray, labels: np.ndarray, max_length: int, strategy: TruncationStrategy
) -> tuple[np.ndarray, np.ndarray] | None:
    """Truncate a row to at most `max_length` tokens.

    `delete` returns None for a row that is too long. `right` removes its end. `left` removes tokens before the last
    response, but not the token that predicts the response's first one, and then, where that is not enough, the
    response's end; in a row without a response it removes the start. The result may have no label left.

    Args:
        input_ids: int64 [L].
        labels: shifted labels, int64 [L].
        max_length: most tokens.
        strategy: `data.truncation_strategy`.
    """
    excess = len(input_ids) - max_length
    if excess <= 0:
        return input_ids, labels
    if strategy == "delete":
        return None
    start = min(excess, _start_of_last_response(labels)) if strategy == "left" else 0
    if strategy == "left" and (labels == IGNORED_LABEL).all():
        start = excess
    kept = slice(start, start + max_length)
    input_ids, labels = input_ids[kept], labels[kept].copy()
    labels[-1] = IGNORED_LABEL  # the token that it would predict is gone, or was never there
    return input_ids, labels


def _start_of_last_response(labels: np.ndarray) -> int:
    """Return the position that predicts the first token of the last run of trained tokens; 0 where there is none."""
    trained = labels != IGNORED_LABEL
    starts = np.flatnonzero(trained & ~np.concatenate(([False], trained[:-1])))
    return int(starts[-1]) if len(starts) else 0

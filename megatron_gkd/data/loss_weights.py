"""The weight of each token's loss: the strategy of `data.loss_scale`, and the key `loss` of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_gkd.config.loss_scale import LossScaleName, LossTurns, ignores_empty_think, turns_of
from megatron_gkd.data.bad_row import BadRow
from megatron_gkd.data.prompt import prompt_length
from megatron_gkd.data.sample import IGNORED_LABEL

LOSS = "loss"  # the key of a message, and why a row is bad
MAX_WEIGHT = 1e6
EMPTY_THINK = re.compile(r"\s*(<think>\s*)?</think>\s*")  # the generation prompt may have the opening tag already


@dataclass(frozen=True)
class LossStrategy:
    """Which tokens of a row are trained on.

    Attributes:
        turns: the turns that are.
        ignores_empty_think: an empty block of thoughts at the start of such a turn is not.
    """

    turns: LossTurns = "last_round"
    ignores_empty_think: bool = False

    @classmethod
    def from_name(cls, name: LossScaleName) -> LossStrategy:
        """Build the strategy that `data.loss_scale` names."""
        return cls(turns_of(name), ignores_empty_think(name))

    @property
    def has_prompts(self) -> bool:
        """Whether tokens outside the assistant turns are trained on, too."""
        return self.turns == "all"

    def weigh_turns(self, messages: Sequence[dict[str, Any]], losses: Sequence[float | None]) -> dict[int, float]:
        """Return the weight of each assistant turn by its index in `messages`.

        Args:
            messages: of a conversation.
            losses: what the row says of each message; None where it says nothing. Empty where it says nothing at all.

        Raises:
            BadRow: "loss": a message of another role has a loss of its own where all of them are trained on.
        """
        said = losses or [None] * len(messages)
        last_user = max((index for index, message in enumerate(messages) if message["role"] == "user"), default=-1)
        weights: dict[int, float] = {}
        for index, (message, loss) in enumerate(zip(messages, said, strict=True)):
            if message["role"] == "assistant":
                is_trained = self.turns != "last_round" or index > last_user
                weights[index] = float(is_trained) if loss is None else loss
            elif loss is not None and self.has_prompts:
                detail = (
                    f"messages[{index}] ({message['role']}) has one, which only assistant turns may under loss_scale"
                )
                raise BadRow(LOSS, f"{detail}: all")
        return weights


def take_losses(messages: Sequence[dict[str, Any]]) -> tuple[float | None, ...]:
    """Remove the key `loss` of each message, which no chat template is to render, and return `Conversation.losses`.

    Raises:
        BadRow: "loss": one is neither true, false nor a number >= 0, or is above 0 outside an assistant turn.
    """
    losses = tuple(_take_loss(message, f"messages[{index}]") for index, message in enumerate(messages))
    return losses if any(loss is not None for loss in losses) else ()


def _take_loss(message: dict[str, Any], name: str) -> float | None:
    loss = message.pop(LOSS, None)
    if loss is None:
        return None
    if not isinstance(loss, bool | int | float) or not 0 <= loss <= MAX_WEIGHT:
        raise BadRow(LOSS, f"{name}.loss = {loss!r}: must be true, false, or a weight from 0 to {MAX_WEIGHT:g}")
    if loss and message["role"] != "assistant":
        detail = "only assistant turns have a loss of their own; loss_scale: all trains on prompts, too"
        raise BadRow(LOSS, f"{name}.loss = {loss!r}: {detail}")
    return float(loss)


class TokenWeights(NamedTuple):
    """What a sample stores of a row's weights.

    Attributes:
        labels: int64 [L], shifted; -100 where the weight is 0.
        label_weights: see `Sample`.
        response_start: see `Sample`.
    """

    labels: np.ndarray
    label_weights: np.ndarray | None
    response_start: int | None


def read_weights(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields `label_weights` and `response_start` of a sample from its row of the columns."""
    weights, start = columns["label_weights"], int(columns["response_start"])
    return {
        "label_weights": weights.astype(np.float32) if len(weights) else None,
        "response_start": start if start >= 0 else None,
    }


def shift_weights(weights: np.ndarray) -> np.ndarray:
    """Return float32 [L], for each position the weight of the token that it predicts; `weights` are the tokens' own."""
    return np.append(weights[1:], 0).astype(np.float32)


def apply_weights(input_ids: np.ndarray, labels: np.ndarray, weights: np.ndarray | None) -> TokenWeights:
    """Return the labels that have a weight.

    Args:
        input_ids: int64 [L].
        labels: int64 [L], shifted labels of the turns; the last run of them is the response.
        weights: float32 [L], by the position that predicts; None where it is 1 for each label and 0 elsewhere.
    """
    if weights is None:
        return TokenWeights(labels, None, None)
    weighted = np.full_like(labels, IGNORED_LABEL)
    weighted[:-1] = np.where(weights[:-1] > 0, input_ids[1:], IGNORED_LABEL)
    is_label = weighted != IGNORED_LABEL
    start = prompt_length(labels)
    return TokenWeights(
        weighted,
        None if (weights[is_label] == 1).all() else np.where(is_label, weights, 0).astype(np.float32),
        None if prompt_length(weighted) == start else start,
    )

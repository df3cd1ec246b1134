"""What a server is asked about one sequence, and what it may answer: log-probabilities as JSON, checked, to arrays.

Answers are large (some 80 bytes a token of the top-k), so they are decoded by msgspec into what is wanted of them only,
and prompts' positions are passed over.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np

from megatron_gkd.data.sample import Sample
from megatron_gkd.errors import UserError

MINUS_INFINITY = -9999.0
"""What vLLM writes for -inf, which JSON has not."""
_MOST_MASS = 1.005  # probabilities add up to 1, and roundings


@dataclass(frozen=True)
class Question:
    """The teacher's distributions after some tokens of a sequence.

    Attributes:
        token_ids: int64 [L], the sequence up to the token behind the last position.
        positions: int64 [n], rising, at least one: after each of these tokens.
    """

    token_ids: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, sample: Sample) -> Question | None:
        """What a sample's labels need; None where it has none."""
        positions = sample.label_positions
        return cls(sample.input_ids[: positions[-1] + 2], positions) if len(positions) else None

    @cached_property
    def key(self) -> bytes:
        """The same for equal questions, in every process."""
        lengths = np.array([len(self.token_ids)])
        parts = (np.asarray(part, dtype=np.int64).tobytes() for part in (lengths, self.token_ids, self.positions))
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


@dataclass(frozen=True)
class Scores:
    """ids: int32 [n, k]; log_probs: fp32 [n, k], -inf for probability 0. In no order."""

    ids: np.ndarray
    log_probs: np.ndarray


def mean_difference(a: Scores, b: Scores) -> float:
    """Return by how many nats the log-probabilities of the same positions differ, on average over all tokens.

    A token that only one of the two has counts with what it differs by at least: it is not more likely in the other
    than the least likely token there.
    """
    differences = []
    for row in zip(a.ids, a.log_probs, b.ids, b.log_probs, strict=True):
        ids_a, values_a, ids_b, values_b = (part.tolist() for part in row)
        first, second = dict(zip(ids_a, values_a, strict=True)), dict(zip(ids_b, values_b, strict=True))
        for token in first.keys() | second.keys():
            x, y = first.get(token, min(values_a)), second.get(token, min(values_b))
            is_known = token in first and token in second
            above = x - y if token in first else y - x
            differences.append(0.0 if x == y else abs(above) if is_known else max(0.0, above))
    return float(np.mean(differences))


class _Entry(msgspec.Struct):
    logprob: float
    rank: int


class _Choice(msgspec.Struct):
    prompt_token_ids: list[int]
    prompt_logprobs: list[msgspec.Raw]


class _Answer(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]


ANSWER = msgspec.json.Decoder(_Answer)
"""Of the content of a response of /v1/completions."""
_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_ENTRIES = msgspec.json.Decoder(dict[_Token, _Entry] | None)


def read_answer(answer: _Answer, question: Question, k: int) -> Scores:
    """Raises UserError, without the server's address, for anything but k log-probabilities for each position."""
    choice = answer.choices[0]
    if choice.prompt_token_ids != question.token_ids.tolist():
        raise UserError("its answer is about other token ids than it was sent")
    entries = choice.prompt_logprobs
    if len(entries) != len(question.token_ids):
        raise UserError(f"its answer has {len(entries)} positions of {len(question.token_ids)}")
    ids = np.empty((len(question.positions), k), dtype=np.int32)
    log_probs = np.empty((len(question.positions), k), dtype=np.float32)
    for row, position in enumerate(question.positions.tolist()):
        _read_position(entries[position + 1], position, int(question.token_ids[position + 1]), ids[row], log_probs[row])
    log_probs[log_probs <= MINUS_INFINITY] = -np.inf
    mass = np.exp(log_probs.astype(np.float64)).sum(-1).max()
    if log_probs.max() > 1e-3 or mass > _MOST_MASS:
        raise UserError(
            f"its log-probabilities are none: the largest is {log_probs.max():.4g}, and probabilities add up to "
            f"{mass:.4g}; start it with --logprobs-mode raw_logprobs"
        )
    return Scores(ids, log_probs)


def _read_position(raw: msgspec.Raw, position: int, token_id: int, ids: np.ndarray, log_probs: np.ndarray) -> None:
    """Of the token that follows `position`. Its own entry is always there, within the k of highest rank or beside."""
    try:
        entries = _ENTRIES.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"its answer has no log-probabilities at position {position} ({error})") from error
    if entries is None or token_id not in entries:
        raise UserError(f"its answer at position {position} does not have the token {token_id} that follows there")
    k = len(ids)
    kept = [(token, entry.logprob) for token, entry in entries.items() if entry.rank <= k]
    if len(kept) != k:
        raise UserError(f"its answer at position {position} has {len(kept)} tokens where {k} were asked for")
    ids[:], log_probs[:] = zip(*kept, strict=True)

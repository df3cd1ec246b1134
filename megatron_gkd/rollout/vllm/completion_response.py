"""The responses of /v1/completions and /inference/v1/generate, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

FinishReason = Literal["stop", "length"]

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
_ROUNDING = 1e-3  # nats by which a log-probability may be above 0


@dataclass(frozen=True)
class Sampled:
    """What vLLM samples for one prompt.

    Attributes:
        token_ids: without the prompt.
        log_probs: one for each of `token_ids`, in nats.
        finish_reason: as `Completion.finish_reason`.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None]


class SampledChoice(msgspec.Struct):
    """One completion of a response."""

    finish_reason: str
    token_ids: list[int] | None = None
    logprobs: _LogProbs | None = None


class CompletionResponse(msgspec.Struct):
    """A response of /v1/completions."""

    choices: Annotated[list[SampledChoice], msgspec.Meta(min_length=1)]

    prompt_token_ids: list[int] | None = None

    @property
    def first(self) -> SampledChoice:
        """The first completion."""
        return self.choices[0]


class _TokenLogProb(msgspec.Struct):
    logprob: float | None


class _LogProbsOfTokens(msgspec.Struct):
    content: list[_TokenLogProb]


class _GeneratedChoice(msgspec.Struct):
    finish_reason: str
    token_ids: list[int] | None = None
    logprobs: _LogProbsOfTokens | None = None


class GenerationResponse(msgspec.Struct):
    """A response of /inference/v1/generate: the same under other names."""

    choices: Annotated[list[_GeneratedChoice], msgspec.Meta(min_length=1)]
    prompt_token_ids: list[int] | None = None

    @property
    def first(self) -> SampledChoice:
        """The first completion, as in a response of /v1/completions."""
        choice = self.choices[0]
        log_probs = None if choice.logprobs is None else _LogProbs([one.logprob for one in choice.logprobs.content])
        return SampledChoice(choice.finish_reason, choice.token_ids, log_probs)


COMPLETION_DECODER = msgspec.json.Decoder(CompletionResponse)
GENERATION_DECODER = msgspec.json.Decoder(GenerationResponse)


def read_choice(choice: SampledChoice, reason: FinishReason, max_tokens: int) -> Sampled:
    """Return the content of a choice that has ended by `reason`.

    Raises:
        ValueError: the choice is not that of a request for at most `max_tokens` tokens with their log-probabilities.
    """
    ids = choice.token_ids
    if not ids:
        raise ValueError(f"its token_ids are {ids}; expected are the ids of the completion (return_token_ids)")
    if min(ids) < 0:
        raise ValueError(f"its token_ids hold {min(ids)}; expected are ids from 0")
    if len(ids) > max_tokens:
        raise ValueError(f"it has {len(ids)} tokens; expected are at most max_tokens = {max_tokens}")
    log_probs = choice.logprobs.token_logprobs if choice.logprobs else None
    if log_probs is None or len(log_probs) != len(ids):
        number = "no" if log_probs is None else len(log_probs)
        raise ValueError(f"it has {number} token_logprobs; expected are {len(ids)}, one for each of its token_ids")
    valid = [value for value in log_probs if value is not None and value <= _ROUNDING]
    if len(valid) < len(ids):
        raise ValueError(
            "its token_logprobs are not all numbers up to 0; start the server with --logprobs-mode raw_logprobs"
        )
    return Sampled(ids, valid, reason)

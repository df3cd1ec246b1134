"""A scoring request for one sequence, and the check of its response: log-probabilities from JSON to arrays.

Responses are large (some 80 bytes for each token of the top-k), so msgspec decodes only the fields and positions that
are needed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import msgspec
import numpy as np

from megatron_gkd.data.sample import Sample
from megatron_gkd.data.vision.expansion import find_image_tokens, replace_tokens
from megatron_gkd.data.vision.image import Image, Video
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import ServiceError, UserError

MINUS_INFINITY = -9999.0
"""What vLLM writes for -inf, which JSON cannot express."""
_MAX_MASS = 1.005  # sum of probabilities, with rounding errors


@dataclass(frozen=True)
class ScoreRequest:
    """Request for the teacher's distributions after some tokens of a sequence.

    Attributes:
        token_ids: int64 [L], the sequence up to the token after the last position.
        positions: int64 [n], rising, at least one: after each of these tokens.
        images: those whose tokens are in `token_ids`, in order.
        rendered_ids: `token_ids` with one placeholder for each image, as a server takes them; None without images.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    images: tuple[Image, ...] = ()
    rendered_ids: np.ndarray | None = None

    @classmethod
    def from_sample(cls, sample: Sample, processing: ImageProcessing | None = None) -> ScoreRequest | None:
        """Build the request for a sample's labels; None where it has none.

        Args:
            sample: as the teacher reads it.
            processing: made the tokens of its images.

        Raises:
            UserError: it has a video.
        """
        positions = sample.label_positions
        if not len(positions):
            return None
        token_ids = sample.input_ids[: positions[-1] + 2]
        if not sample.images or processing is None:
            return cls(token_ids, positions)
        for image in sample.images:
            if isinstance(image, Video):
                raise UserError(
                    f"{image.location}: a teacher's server is sent no videos; use a "
                    "teacher_model, or a cache of one's scores"
                )
        spans = find_image_tokens(sample.input_ids, sample.images, processing)
        spans = [span for span in spans if span.stop <= len(token_ids)]
        rendered_ids = replace_tokens(token_ids, spans, [[processing.placeholder_id]] * len(spans))
        return cls(token_ids, positions, sample.images[: len(spans)], rendered_ids)

    @cached_property
    def key(self) -> bytes:
        """Hash of the request, the same in every process."""
        lengths = np.array([len(self.token_ids)])
        parts = [np.asarray(part, dtype=np.int64).tobytes() for part in (lengths, self.token_ids, self.positions)]
        parts += [image.digest.encode() for image in self.images]
        return hashlib.blake2b(b"".join(parts), digest_size=16).digest()


@dataclass(frozen=True)
class Scores:
    """The k most likely tokens at n positions, in no order.

    Attributes:
        ids: int32 [n, k].
        log_probs: fp32 [n, k], -inf for probability 0.
    """

    ids: np.ndarray
    log_probs: np.ndarray


def mean_difference(a: Scores, b: Scores) -> float:
    """Return the mean absolute difference of the log-probabilities at the same positions, in nats.

    A token that only one of the two has counts with the lower bound of its difference: in the other it is not more
    likely than the least likely token there.
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


class PromptScores(msgspec.Struct):
    """What a response has of the prompt: its tokens, and the entries of each of them but the first."""

    prompt_token_ids: list[int]
    prompt_logprobs: list[msgspec.Raw]


class _Completions(msgspec.Struct):
    choices: Annotated[list[PromptScores], msgspec.Meta(min_length=1)]


COMPLETIONS_DECODER = msgspec.json.Decoder(_Completions)
"""Decoder of the content of a response of /v1/completions."""
GENERATION_DECODER = msgspec.json.Decoder(PromptScores)
"""Decoder of the content of a response of /inference/v1/generate."""
_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_ENTRIES = msgspec.json.Decoder(dict[_Token, _Entry] | None)


def parse_response(prompt: PromptScores, request: ScoreRequest, k: int) -> Scores:
    """Return the k log-probabilities at each position of the request.

    Raises:
        UserError: the server makes other tokens of the images; no message has the server's address.
        ServiceError: the response lacks some log-probabilities, or has other values.
    """
    if prompt.prompt_token_ids != request.token_ids.tolist():
        if request.images:
            raise UserError(_other_image_tokens(prompt, request))
        raise ServiceError("the response has other token ids than the request")
    entries = prompt.prompt_logprobs
    if len(entries) != len(request.token_ids):
        raise ServiceError(f"the response has {len(entries)} positions; the request has {len(request.token_ids)}")
    ids = np.empty((len(request.positions), k), dtype=np.int32)
    log_probs = np.empty((len(request.positions), k), dtype=np.float32)
    for row, position in enumerate(request.positions.tolist()):
        next_token = int(request.token_ids[position + 1])
        ids[row], log_probs[row] = _parse_position(entries[position + 1], position, next_token, k)
    log_probs[log_probs <= MINUS_INFINITY] = -np.inf
    mass = np.exp(log_probs.astype(np.float64)).sum(-1).max()
    if log_probs.max() > 1e-3 or mass > _MAX_MASS:
        raise ServiceError(
            f"the response's values are no log-probabilities: the largest is {log_probs.max():.4g}, and probabilities "
            f"add up to {mass:.4g}; start the server with --logprobs-mode raw_logprobs"
        )
    return Scores(ids, log_probs)


def _other_image_tokens(prompt: PromptScores, request: ScoreRequest) -> str:
    sizes = ", ".join(f"{image.width}x{image.height}" for image in request.images)
    return (
        f"makes {len(prompt.prompt_token_ids)} tokens of a sequence with images of {sizes} pixels, of which the "
        f"student's processor makes {len(request.token_ids)}; both need the same settings, and the limits "
        "data.min_pixels and data.max_pixels"
    )


def _parse_position(raw: msgspec.Raw, position: int, next_token: int, k: int) -> tuple[list[int], list[float]]:
    """Return the ids and log-probabilities of the k most likely tokens after `position`.

    The entry of the token that follows there is always in the response, whether it is among the k or not.
    """
    try:
        entries = _ENTRIES.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ServiceError(f"the response has no log-probabilities at position {position} ({error})") from error
    if entries is None or next_token not in entries:
        raise ServiceError(f"the response at position {position} lacks the token {next_token} that follows there")
    kept = {token: entry.logprob for token, entry in entries.items() if entry.rank <= k}
    if len(kept) != k:
        raise ServiceError(f"the response at position {position} has {len(kept)} tokens; the request is for {k}")
    return list(kept), list(kept.values())

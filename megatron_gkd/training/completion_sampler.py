"""Generate completions over data-parallel ranks: each rank generates a share, and every rank gets all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from megatron_gkd.data.prompt import extract_prompt
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.vision.image import Image
from megatron_gkd.rollout.base import (
    BackgroundEngine,
    Completion,
    Generation,
    Images,
    OnCompletion,
    RolloutEngine,
    Sampling,
    check_completions,
)

T = TypeVar("T")
MakeRoom = Callable[[], contextlib.AbstractContextManager[None]]


@dataclass(frozen=True)
class SampleRequest:
    """One prompt to complete.

    Attributes:
        prompt: int64 [P], with the tokens of its images in place.
        seed: of the draws.
        max_response_length: most tokens of a response that the models' sequences have room for.
        images: of the prompt, in order.
    """

    prompt: np.ndarray
    seed: int
    max_response_length: int
    images: tuple[Image, ...] = ()

    @classmethod
    def from_sample(cls, sample: Sample, seed: int, max_response_length: int) -> SampleRequest:
        """Build the request for the response to a row. All of its images are in the prompt: responses are text."""
        return cls(extract_prompt(sample), seed, max_response_length, sample.images)


class CompletionSampler:
    """Share requests out over data-parallel ranks.

    All ranks must call its methods together, with the same requests, except `share`.

    Args:
        engine: samples completions.
        sampling: how they are drawn.
        dp: the data-parallel group.
        make_room: frees device memory inside the context, for the engine.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampling: Sampling,
        dp: dist.ProcessGroup,
        make_room: MakeRoom = contextlib.nullcontext,
    ) -> None:
        self.engine, self.sampling, self.dp, self._make_room = engine, sampling, dp, make_room

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this rank's share of `items`: every `dp.size()`-th."""
        return items[self.dp.rank() :: self.dp.size()]

    def generate(self, requests: Sequence[SampleRequest], sampling: Sampling | None = None) -> list[Completion]:
        """Return one completion a request, in order, drawn as `sampling` says (None: as `self.sampling`)."""
        return self.gather(requests, self.generate_share(requests, sampling))

    def generate_share(self, requests: Sequence[SampleRequest], sampling: Sampling | None = None) -> list[Completion]:
        """Return the completions of this rank's share, which `gather` takes."""
        prompts, seeds, images = _split(self.share(requests))
        with self._make_room(), self.engine.resident():
            return self.engine.generate(prompts, sampling or self.sampling, seeds, images)

    def start(self, requests: Sequence[SampleRequest], on_completion: OnCompletion | None = None) -> Generation:
        """Start to generate this rank's share in the background; `gather` takes the result.

        Raises:
            TypeError: the engine is not a `BackgroundEngine`.
        """
        if not isinstance(self.engine, BackgroundEngine):
            raise TypeError(f"{type(self.engine).__name__} can not generate in the background")
        prompts, seeds, images = _split(self.share(requests))
        return self.engine.start(prompts, self.sampling, seeds, images, on_completion)

    def gather(self, requests: Sequence[SampleRequest], completions: Sequence[Completion]) -> list[Completion]:
        """Return the completions of all requests, truncated to their maximal lengths.

        Args:
            requests: of all ranks.
            completions: of this rank's share.

        Raises:
            RolloutFailed: a completion has an id that `sampling` excludes.
        """
        truncated = [
            completion.truncate(request.max_response_length)
            for request, completion in zip(self.share(requests), completions, strict=True)
        ]
        size = self.dp.size()
        parts: list[list[Completion]] = [[] for _ in range(size)]
        dist.all_gather_object(parts, truncated, group=self.dp)
        gathered = [parts[index % size][index // size] for index in range(len(requests))]
        check_completions(gathered, self.sampling)
        return gathered


def _split(requests: Sequence[SampleRequest]) -> tuple[list[list[int]], list[int], Images | None]:
    """Return prompts, seeds and images; None where no prompt has any."""
    images = [request.images for request in requests] if any(request.images for request in requests) else None
    return [request.prompt.tolist() for request in requests], [request.seed for request in requests], images

"""The protocol of rollout engines: token ids and images in, token ids out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from megatron_gkd.data.vision.image import Image
from megatron_gkd.errors import ServiceError

# vLLM raises lower temperatures to 0.01. Above the highest, logits of ordinary size differ by rounding errors only.
TEMPERATURES = (1e-2, 1e3)
# A lower one would make ids likely again that vLLM excludes by a negative logit (see `vllm.logit_bias`).
REPETITION_PENALTIES = (0.5, 2.0)


class RolloutFailed(ServiceError):
    """The engine can not make the samples. All ranks raise it together, and the student has not changed."""

    is_shared = True


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: penalty, temperature, then the filters min-p, top-k, top-p, in vLLM's order.

    Attributes:
        max_completion_length: most tokens of a completion, its EOS included.
        temperature: divides the logits, from 0.01 to 1000; 0 takes the most likely token.
        top_k: only that many most likely tokens may be drawn; 0 or None: all.
        top_p: only the smallest set of most likely tokens with at least that mass may be drawn; 1: all.
        min_p: only tokens with at least that share of the most likely one's probability may be drawn; 0: all.
        repetition_penalty: divides the positive logits of tokens that occurred in the prompt or the completion, and
            multiplies the negative ones, from 0.5 to 2; 1: none.
        stop_token_ids: tokens that end a completion, beside the model's EOS.
        ignore_eos: the model's EOS does not end a completion; `stop_token_ids` and `stop` still do.
        stop: texts that end a completion with the token that completes one of them; it stays in the completion.
        vocab_size: only ids below it may be drawn, so that every model of the run can read them; None: all.
        reserved_ids: ids that are never drawn, since they stand for images, videos or audio in what a model reads.

    Raises:
        ValueError: a value is not allowed; the message names it and what is.
    """

    max_completion_length: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    vocab_size: int | None = None
    reserved_ids: tuple[int, ...] = ()
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length is {self.max_completion_length}; it must be at least 1")
        lowest, highest = TEMPERATURES
        if not (self.temperature == 0 or lowest <= self.temperature <= highest):
            allowed = f"0 (greedy) or in [{lowest:g}, {highest:g}]"
            raise ValueError(f"temperature is {self.temperature}; it must be {allowed}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be a positive number, or 0 or None for all tokens")
        self._check_likelihoods()
        if any(token < 0 for token in self.stop_token_ids):
            raise ValueError(f"stop_token_ids are {self.stop_token_ids}; token ids are not negative")
        if "" in self.stop:
            raise ValueError(f"stop is {self.stop}; a text that ends completions is not empty")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at least 1, or None for all ids")
        if any(token < 0 for token in self.reserved_ids):
            raise ValueError(f"reserved_ids are {self.reserved_ids}; token ids are not negative")

    def _check_likelihoods(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be at least 0 and at most 1")
        lowest, highest = REPETITION_PENALTIES
        if not lowest <= self.repetition_penalty <= highest:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be in [{lowest}, {highest}]")

    def num_shared_ids(self, model_vocab_size: int) -> int:
        """Return how many ids, from 0 on, all models of the run can read, if one of them has `model_vocab_size`."""
        return model_vocab_size if self.vocab_size is None else min(self.vocab_size, model_vocab_size)

    def excluded_ids(self, model_vocab_size: int) -> list[int]:
        """Return the ids of a model with `model_vocab_size` ids that may not be drawn, rising."""
        shared = self.num_shared_ids(model_vocab_size)
        return [*sorted({token for token in self.reserved_ids if token < shared}), *range(shared, model_vocab_size)]


@dataclass(frozen=True)
class Completion:
    """What was generated for one prompt.

    Attributes:
        token_ids: without the prompt; with the EOS, stop token or end of a stop string, where one ended it.
        log_probs: one for each of `token_ids`, in nats: log-softmax of the model's logits as they are: at temperature 1
            and without penalty and filters, whatever the token was drawn with. Where `Sampling.vocab_size` excludes
            ids, MegatronEngine normalizes over the others, as the loss does; vLLM over the whole vocabulary. Reserved
            ids count in both, as in the loss, whose student gives them a probability.
        finish_reason: "stop" if an EOS, stop token or stop string ended it, "length" if `max_completion_length` did.
        version: of the weights that generated it, as given to `load_weights`.
    """

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: Literal["stop", "length"]
    version: int

    def truncate(self, max_length: int) -> Completion:
        """Return the completion with at most `max_length` tokens."""
        if len(self.token_ids) <= max_length:
            return self
        return Completion(self.token_ids[:max_length], self.log_probs[:max_length], "length", self.version)


Images = Sequence[tuple[Image, ...]]
"""The images of each prompt."""


class RolloutEngine(Protocol):
    """Generate completions: `with engine.resident(): engine.load_weights(...); engine.generate(...)`."""

    def resident(self) -> AbstractContextManager[None]:
        """Return a context inside which the engine can generate: it has its memory on the device."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Generate with these weights from now on: whole tensors under their Hugging Face names.

        All ranks call it together, and an engine either exhausts `named_tensors` on every rank or leaves it alone.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        images: Images | None = None,
    ) -> list[Completion]:
        """Generate one completion a prompt, in order; one seed a prompt.

        All ranks call it together. Those of one model replica pass the same prompts and get the same completions;
        data-parallel replicas pass prompts of their own, or none.

        Args:
            prompts: token ids, with the tokens of all images in place (`ImageProcessing.tokens`).
            sampling: how the completions are drawn.
            seeds: one a prompt.
            images: those of each prompt, in order; None where no prompt has any.

        Raises:
            ValueError: a prompt is empty or has ids outside the vocabulary, or does not have the tokens of its images;
                or there is not one seed a prompt.
        """
        ...


OnCompletion = Callable[[int, Completion], None]
"""Takes the prompt's place in the request, and its completion."""


class Generation(Protocol):
    """Completions that are being generated.

    Attributes:
        seconds: that generating them took; known with the result.
    """

    seconds: float

    def result(self) -> list[Completion]:
        """Wait for the completions. All ranks call it together, and get them as from `RolloutEngine.generate`."""
        ...


@runtime_checkable
class BackgroundEngine(RolloutEngine, Protocol):
    """An engine that can generate while its ranks train."""

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        images: Images | None = None,
        on_completion: OnCompletion | None = None,
    ) -> Generation:
        """Start what `generate` does, and return at once. Until there is a result, no weights may be loaded.

        Threads in the background communicate with no other rank. One rank of each replica, on the last pipeline
        stage, calls `on_completion` from some thread for each prompt as soon as it is completed.
        """
        ...

    def close(self) -> None:
        """Stop all other work in the background."""
        ...


def check_completions(completions: Iterable[Completion], sampling: Sampling) -> None:
    """Check that all ids are among those that may be drawn.

    Raises:
        RolloutFailed: one is not.
    """
    vocab_size, reserved = sampling.vocab_size, set(sampling.reserved_ids)
    for completion in completions:
        if vocab_size is not None and max(completion.token_ids, default=0) >= vocab_size:
            raise RolloutFailed(
                f"the rollout engine drew the token id {max(completion.token_ids)}; student and teacher share 0 to "
                f"{vocab_size - 1}. Its model has another vocabulary, or it ignores logit_bias"
            )
        drawn = reserved.intersection(completion.token_ids)
        if drawn:
            raise RolloutFailed(
                f"the rollout engine drew the token id {min(drawn)}, which stands for an image, a video or audio; it "
                "ignores logit_bias"
            )


def check_prompts(
    prompts: Sequence[Sequence[int]], seeds: Sequence[int], vocab_size: int, images: Images | None = None
) -> None:
    """Check the arguments of `RolloutEngine.generate`, and raise its ValueError."""
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: every prompt needs one seed")
    if images is not None and len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts and images of {len(images)}: each prompt needs its images, or none")
    for index, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(f"prompt {index} has the token id {outside[0]}; allowed are 0 to {vocab_size - 1}")

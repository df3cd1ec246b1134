"""Sample with vLLM in the training processes: weights go from a rank to its own engine, without a copy on disk.

Each engine has one rank, or `tensor_parallel_size` consecutive ranks. The prompts of all replicas are dealt out among
all engines of the world, and every replica gets its completions back. A failure of one rank is raised in all of them
together.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_gkd.data.vision.files import read_encoded
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import GkdError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Completion, Images, RolloutFailed, Sampling, check_prompts
from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions
from megatron_gkd.rollout.vllm.process import VllmProcess
from megatron_gkd.rollout.vllm.prompt import VllmPrompt, build_prompts
from megatron_gkd.rollout.vllm.weight_folder import Shapes, check_shapes
from megatron_gkd.runtime.mesh import Mesh

_PARTS = ("weights", "kv_cache")

T = TypeVar("T")


@dataclass(frozen=True)
class _PromptRequest:
    """One prompt of a replica. `index` is its place in the replica's request."""

    replica: int
    index: int
    prompt: VllmPrompt
    seed: int


class VllmColocatedEngine:
    """Rollout engine with vLLM in the training processes. All ranks make it together.

    Args:
        mesh: of the ranks; the engine keeps no process group of it.
        checkpoint: what the student began as: new weights have its names and shapes, and its EOS ends completions.
        options: how vLLM runs.
        vllm: this rank's, started with `options`.
    """

    def __init__(self, mesh: Mesh, checkpoint: Checkpoint, options: ColocatedOptions, vllm: VllmProcess) -> None:
        self.checkpoint, self.options, self.vllm = checkpoint, options, vllm
        self.replica = mesh.dp.rank()
        self.is_leader = mesh.is_leader
        self.engine, self.place = divmod(dist.get_rank(), options.tensor_parallel_size)
        self.num_engines = dist.get_world_size() // options.tensor_parallel_size
        self.expected = checkpoint.shapes
        self.optional = ("lm_head.weight",) if checkpoint.is_tied else ()
        self.version: int | None = None
        self.asleep: tuple[str, ...] = ()
        _agree(self._sleep)

    @classmethod
    def start(
        cls, mesh: Mesh, checkpoint: Checkpoint, options: ColocatedOptions, images: ImageProcessing | None = None
    ) -> VllmColocatedEngine:
        """Start vLLM on all ranks. `images`: what the student's processor makes of images; None for a text model.

        Raises:
            RolloutFailed: on all ranks; vLLM can't be started on one.
        """
        problem: Exception | None = None
        try:
            vllm = VllmProcess(checkpoint, options, images)
        except Exception as error:
            problem = _build_failure(error)
        _all_gather(None, problem)
        return cls(mesh, checkpoint, options, vllm)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """Allocate vLLM's memory for the context, and free it at the end as `sleep_level` says."""
        _agree(lambda: self._wake_up(_PARTS))
        try:
            yield
        except BaseException:  # which other ranks may not have
            self._sleep()
            raise
        _agree(self._sleep)

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Load a version, in memory that stays allocated until the end of `resident`; see `RolloutEngine.load_weights`.

        Raises:
            RolloutFailed: the tensors are not the checkpoint's in names and shapes, or vLLM can't load them. Nothing
                can be generated until others are loaded.
        """
        self.version = None
        _agree(lambda: self._wake_up(("weights",)))
        tensors = _ExpectedTensors(named_tensors, self.expected)
        problem: Exception | None = None
        try:
            self.vllm.load(tensors)
        except Exception as error:
            problem = _build_failure(error)
        for _ in tensors:  # making one takes all ranks
            pass
        try:
            check_shapes(tensors.shapes, self.expected, self.optional)
        except GkdError as error:
            problem = _build_failure(error)
        _all_gather(None, problem)
        self.version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        images: Images | None = None,
    ) -> list[Completion]:
        """Generate one completion a prompt; see `RolloutEngine.generate`.

        Raises:
            RolloutFailed: a prompt leaves no room for a token, an image can't be read, or vLLM fails.
        """
        problem: Exception | None = None
        own: list[_PromptRequest] = []
        try:
            check_prompts(prompts, seeds, self.checkpoint.vocab_size, images)
            self._check_ready(prompts)
            built = build_prompts(prompts, images, self.vllm.images)
            own = [
                _PromptRequest(self.replica, index, *pair) for index, pair in enumerate(zip(built, seeds, strict=True))
            ]
        except (ValueError, RolloutFailed) as error:
            problem = error
        requests = [request for part in _all_gather(own if self.is_leader else [], problem) for request in part]
        of_engine = requests[self.engine :: self.num_engines]
        if any(request.prompt.images for request in requests):
            _all_gather(None, _find_unreadable(of_engine))
        completions: list[tuple[_PromptRequest, Completion]] = []
        try:
            completions = self._complete(of_engine, sampling)
        except Exception as error:
            problem = _build_failure(error)
        # One rank of each engine returns the completions; the prompts stay where they are.
        results = [(request.replica, request.index, completion) for request, completion in completions]
        parts = _all_gather(results if self.place == 0 else [], problem)
        by_index = {index: done for part in parts for replica, index, done in part if replica == self.replica}
        return [by_index[index] for index in range(len(prompts))]

    def _check_ready(self, prompts: Sequence[Sequence[int]]) -> None:
        if self.version is None or self.asleep:
            raise RolloutFailed(
                "vLLM has no weights of the student, or is asleep; load_weights and resident come first"
            )
        for index, prompt in enumerate(prompts):
            if len(prompt) >= self.options.max_model_len:
                raise RolloutFailed(
                    f"prompt {index} of {len(prompt)} tokens leaves no room for a completion in "
                    f"rollout.vllm_max_model_len = {self.options.max_model_len}"
                )

    def _complete(
        self, requests: Sequence[_PromptRequest], sampling: Sampling
    ) -> list[tuple[_PromptRequest, Completion]]:
        version = self.version
        if version is None:  # `_check_ready` has found it out, on this rank or another
            return []
        eos = () if sampling.ignore_eos else self.checkpoint.eos_token_ids
        sampled = self.vllm.generate(
            [request.prompt for request in requests],
            [request.seed for request in requests],
            [
                min(sampling.max_completion_length, self.options.max_model_len - len(request.prompt.token_ids))
                for request in requests
            ],
            replace(sampling, stop_token_ids=tuple(sorted({*sampling.stop_token_ids, *eos}))),
        )
        return [
            (request, Completion(one.token_ids, one.log_probs, one.finish_reason, version))
            for request, one in zip(requests, sampled, strict=True)
        ]

    def _wake_up(self, parts: Sequence[str]) -> None:
        sleeping = tuple(part for part in parts if part in self.asleep)
        if sleeping:
            self.vllm.wake_up(sleeping)
            self.asleep = tuple(part for part in self.asleep if part not in sleeping)

    def _sleep(self) -> None:
        level = self.options.sleep_level
        if level and self.vllm.can_sleep:
            self.vllm.sleep(level)
            self.asleep = _PARTS
            if level == 2:
                self.version = None  # what wakes up is memory without content


def _find_unreadable(requests: Iterable[_PromptRequest]) -> RolloutFailed | None:
    """Return the failure of the first image that can't be read; in vLLM the ranks of an engine would wait for it."""
    try:
        for request in requests:
            for image in request.prompt.images:
                read_encoded(image)
    except GkdError as error:
        return _build_failure(error)
    return None


class _ExpectedTensors:
    """Pass on the tensors whose name and shape are as expected: a wrong one would leave vLLM half-way.

    Attributes:
        shapes: of all tensors so far.
    """

    def __init__(self, named_tensors: Iterable[tuple[str, Tensor]], expected: Shapes) -> None:
        self.tensors, self.expected = iter(named_tensors), expected
        self.shapes: Shapes = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            self.shapes[name] = tuple(tensor.shape)
            if self.expected.get(name) == self.shapes[name]:
                yield name, tensor.detach()


def _agree(work: Callable[[], None]) -> None:
    """Run `work` on every rank, and raise the failure of one of them on all."""
    problem: Exception | None = None
    try:
        work()
    except Exception as error:
        problem = _build_failure(error)
    _all_gather(None, problem)


def _all_gather(value: T, problem: Exception | None) -> list[T]:
    """Return the values of all ranks.

    Raises:
        Exception: `problem`, if there is one.
        RolloutFailed: another rank has a problem; with its message and exit code.
    """
    everything: list = [None] * dist.get_world_size()
    exit_code = getattr(problem, "exit_code", RolloutFailed.exit_code)
    dist.all_gather_object(everything, (value, None) if problem is None else (None, (str(problem), exit_code)))
    if problem is not None:
        raise problem
    for _, other in everything:
        if other is not None:
            message, failure_code = other
            failure = RolloutFailed(message)
            failure.exit_code = failure_code
            raise failure
    return [value for value, _ in everything]


def _build_failure(error: Exception) -> RolloutFailed:
    """Return what a rank raises because of `error`, which is its cause."""
    text = str(error)
    if not isinstance(error, GkdError):
        text = f"vLLM failed in rank {dist.get_rank()}:\n{''.join(traceback.format_exception(error)).strip()}"
    failure = RolloutFailed(text)
    failure.__cause__ = error
    if isinstance(error, GkdError):
        failure.exit_code = error.exit_code
    return failure

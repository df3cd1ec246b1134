"""Sampling by vLLM in the training processes: weights from rank to rank's own engine, without a copy on disk.

Each engine has one rank, or `tensor_parallel_size` neighbouring ranks. The prompts of all replicas are dealt out among
all engines of the world, and every replica gets its completions back. Whatever goes wrong in one rank is raised in all
of them together.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from megatron_gkd.errors import GkdError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Completion, RolloutFailed, Sampling, check_prompts
from megatron_gkd.rollout.vllm.process import ColocatedOptions, VllmProcess
from megatron_gkd.rollout.vllm.weight_folder import Shapes, check_shapes
from megatron_gkd.runtime.mesh import Mesh

_PARTS = ("weights", "kv_cache")

T = TypeVar("T")


class VllmColocatedEngine:
    """All ranks make it together. It keeps no process group of `mesh`.

    `checkpoint` is what the student began as: new weights have its names and shapes, and its EOS ends completions.
    `vllm` is this rank's, started with `options`.
    """

    def __init__(self, mesh: Mesh, checkpoint: Checkpoint, options: ColocatedOptions, vllm: VllmProcess):
        self.checkpoint, self.options, self.vllm = checkpoint, options, vllm
        self.replica = mesh.dp.rank()
        self.is_leader = mesh.is_leader
        self.engine, self.place = divmod(dist.get_rank(), options.tensor_parallel_size)
        self.num_engines = dist.get_world_size() // options.tensor_parallel_size
        self.expected = checkpoint.shapes
        self.optional = ("lm_head.weight",) if checkpoint.config.tie_word_embeddings else ()
        self.version: int | None = None
        self.asleep: tuple[str, ...] = ()
        self._sleep()

    @classmethod
    def start(cls, mesh: Mesh, checkpoint: Checkpoint, options: ColocatedOptions) -> VllmColocatedEngine:
        """Start vLLM on all ranks. RolloutFailed if it can't be on any."""
        vllm, problem = None, None
        try:
            vllm = VllmProcess(checkpoint, options)
        except Exception as error:
            problem = _failure(error)
        _all_gather(None, problem)
        return cls(mesh, checkpoint, options, vllm)

    @contextlib.contextmanager
    def resident(self) -> Iterator[None]:
        """VLLM has its memory inside, and gives it up afterwards as `sleep_level` says."""
        self._wake_up(_PARTS)
        try:
            yield
        finally:
            self._sleep()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `RolloutEngine.load_weights`; wakes the weights up, which stay so until the end of `resident`.

        Raises:
            RolloutFailed: they are not the checkpoint's in names and shapes, or vLLM can't load them. Nothing can be
                generated until others are loaded.
        """
        self.version = None
        self._wake_up(("weights",))
        tensors = _Expected(named_tensors, self.expected)
        problem: Exception | None = None
        try:
            self.vllm.load(tensors)
        except Exception as error:
            problem = _failure(error)
        for _ in tensors:  # making one takes all ranks
            pass
        try:
            check_shapes(tensors.found, self.expected, self.optional)
        except GkdError as error:
            problem = _failure(error)
        _all_gather(None, problem)
        self.version = version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """As `RolloutEngine.generate`. `RolloutFailed` if a prompt leaves no room for a token, or vLLM fails."""
        problem: Exception | None = None
        try:
            check_prompts(prompts, seeds, self.checkpoint.vocab_size)
            self._check_ready(prompts)
        except (ValueError, RolloutFailed) as error:
            problem = error
        asked = list(zip(prompts, seeds, strict=False)) if self.is_leader else []
        requests = [
            (replica, index, prompt, seed)
            for replica, part in _all_gather((self.replica, asked), problem)
            for index, (prompt, seed) in enumerate(part)
        ]
        completions: list[tuple[int, int, Completion]] = []
        try:
            completions = self._complete(requests[self.engine :: self.num_engines], sampling)
        except Exception as error:
            problem = _failure(error)
        answers = _all_gather(completions if self.place == 0 else [], problem)
        found = {index: done for part in answers for replica, index, done in part if replica == self.replica}
        return [found[index] for index in range(len(prompts))]

    def _check_ready(self, prompts: Sequence[Sequence[int]]) -> None:
        if self.version is None or self.asleep:
            raise RolloutFailed(
                "vLLM has no weights of the student, or is asleep; load_weights and resident come first"
            )
        for index, prompt in enumerate(prompts):
            if len(prompt) >= self.options.max_model_len:
                raise RolloutFailed(
                    f"prompt {index} of {len(prompt)} tokens leaves no room for an answer in "
                    f"rollout.vllm_max_model_len = {self.options.max_model_len}"
                )

    def _complete(
        self, requests: Sequence[tuple[int, int, Sequence[int], int]], sampling: Sampling
    ) -> list[tuple[int, int, Completion]]:
        """Of (replica, index, prompt, seed), the replica, the index and the completion."""
        eos = () if sampling.ignore_eos else self.checkpoint.eos_token_ids
        generated = self.vllm.generate(
            [prompt for _, _, prompt, _ in requests],
            [seed for *_, seed in requests],
            [
                min(sampling.max_completion_length, self.options.max_model_len - len(prompt))
                for _, _, prompt, _ in requests
            ],
            replace(sampling, stop_token_ids=tuple(sorted({*sampling.stop_token_ids, *eos}))),
        )
        return [
            (replica, index, Completion(one.token_ids, one.log_probs, one.finish_reason, self.version))
            for (replica, index, *_), one in zip(requests, generated, strict=True)
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


class _Expected:
    """Passes on tensors whose name and shape are as expected, and notes all: a wrong one would leave vLLM half-way."""

    def __init__(self, named_tensors: Iterable[tuple[str, Tensor]], expected: Shapes):
        self.tensors, self.expected = iter(named_tensors), expected
        self.found: Shapes = {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors:
            self.found[name] = tuple(tensor.shape)
            if self.expected.get(name) == self.found[name]:
                yield name, tensor.detach()


def _all_gather(value: T, problem: Exception | None) -> list[T]:
    """The values of all ranks; or `problem` is raised, and RolloutFailed with its words on the other ranks."""
    everything: list = [None] * dist.get_world_size()
    dist.all_gather_object(everything, (value, None) if problem is None else (None, str(problem)))
    if problem is not None:
        raise problem
    for _, other in everything:
        if other is not None:
            raise RolloutFailed(other)
    return [value for value, _ in everything]


def _failure(error: Exception) -> RolloutFailed:
    if isinstance(error, GkdError):
        return RolloutFailed(str(error))
    told = "".join(traceback.format_exception(error)).strip()
    return RolloutFailed(f"vLLM failed in rank {dist.get_rank()}:\n{told}")

"""Sampling by vLLM servers of their own: token ids over HTTP, weights through a folder that both sides see.

One rank of each model replica talks to the servers and tells the others of its replica; the world's first rank gives
all servers new weights. Whatever goes wrong in one rank is raised in all of them together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Completion, RolloutFailed, Sampling, check_prompts
from megatron_gkd.rollout.vllm_client import ServedModel, StudentServer
from megatron_gkd.rollout.vllm_weights import SharedWeights, WeightFolder, tensor_shapes
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import open_client

_MOST_ROUNDS = 5  # in which prompts are asked that a server answered with other weights than the student's

T = TypeVar("T")


@dataclass(frozen=True)
class ServerOptions:
    """The servers, and how they are asked.

    Attributes:
        urls: of the servers' roots; prompts are dealt to them in turn.
        weight_sync_dir: where weights are written for them; they see it under the same path.
        max_length: tokens of a prompt and its completion together.
        concurrency: requests of one replica at the same time, over all servers.
        timeout: seconds that one answer may take.
        patience: seconds that a server may be gone before the run stops.
    """

    urls: tuple[str, ...]
    weight_sync_dir: Path
    max_length: int
    concurrency: int = 64
    timeout: float = 600.0
    patience: float = 300.0


class VllmServerEngine:
    """Waits until the servers answer. All ranks must make it together; `RolloutFailed` if a server does not serve.

    `checkpoint` is what the student began as: new weights have its names and shapes, and its EOS ends completions.
    """

    def __init__(self, mesh: Mesh, checkpoint: Checkpoint, options: ServerOptions):
        self.mesh, self.checkpoint, self.options = mesh, checkpoint, options
        self.weights: SharedWeights | None = None
        self.is_speaker = mesh.tp.rank() == mesh.pp.rank() == mesh.cp.rank() == 0
        self.http: httpx.Client | None = None
        self.servers: list[StudentServer] = []
        self.folder: WeightFolder | None = None
        if self.is_speaker:
            self.http = open_client(options.timeout, options.concurrency)
            self.servers = [StudentServer(url, self.http, options.patience) for url in options.urls]
        if mesh.is_main:
            optional = ("lm_head.weight",) if checkpoint.config.tie_word_embeddings else ()
            self.folder = WeightFolder(options.weight_sync_dir, tensor_shapes(checkpoint.path), optional)
        self.models: list[ServedModel] = self._by_first_rank(
            lambda: self._everywhere(lambda server: server.hello(options.max_length))
        )

    def resident(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `RolloutEngine.load_weights`. `RolloutFailed` if they can't be written, or a server can't load them."""
        if not self.mesh.is_main:
            for _ in named_tensors:  # making one takes all ranks
                pass
        self.weights = self._by_first_rank(lambda: self._hand_over(named_tensors, version))
        for server in self.servers:
            server.want(self.weights)

    def _hand_over(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> SharedWeights:
        weights = self.folder.write(named_tensors, version)
        self._everywhere(lambda server: server.load(weights))
        self.folder.forget_all_but(weights)
        return weights

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """As `RolloutEngine.generate`. `RolloutFailed` if a server is gone for too long, or refuses a request."""
        check_prompts(prompts, seeds, self.checkpoint.vocab_size)
        completions, problem = None, None
        if self.is_speaker:
            try:
                completions = self._complete(prompts, sampling, seeds)
            except UserError as error:
                problem = str(error)
        problems: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        _raise_first(problems)
        return self._tell_replica(completions)

    def _complete(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        first = self.mesh.dp.rank()  # replicas with few prompts do not all ask the same servers
        targets = [(first + index) % len(self.servers) for index in range(len(prompts))]
        requests = [
            self._request(self.models[target], prompt, sampling, seed)
            for target, prompt, seed in zip(targets, prompts, seeds, strict=True)
        ]
        found: dict[int, Completion] = {}
        for _ in range(_MOST_ROUNDS):
            waiting = [index for index in range(len(prompts)) if index not in found]
            if not waiting:
                return [found[index] for index in range(len(prompts))]
            answers = self._in_parallel(lambda i: self.servers[targets[i]].complete(requests[i]), waiting)
            current = self._everywhere(lambda server: server.current_label())
            for index, (label, choice) in zip(waiting, answers, strict=True):
                if label == current[targets[index]]:
                    found[index] = self._completion(choice, requests[index])
        raise UserError(
            f"rollout servers lost the student's weights {_MOST_ROUNDS} times while they answered the same prompts; "
            "look into their logs, and whether another run uses them"
        )

    def _request(self, model: ServedModel, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """To /v1/completions. It names what a server would otherwise take from the model's generation_config.json."""
        eos = () if sampling.ignore_eos else self.checkpoint.eos_token_ids
        return {
            "model": model.name,
            "prompt": list(prompt),
            "max_tokens": min(sampling.max_completion_length, model.max_model_len - len(prompt)),
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "seed": seed % 2**63,  # vLLM takes -1 for none
            "ignore_eos": True,  # which tokens are EOS is for the student's checkpoint to say, not for the server
            "stop_token_ids": sorted({*sampling.stop_token_ids, *eos}),
            "stop": list(sampling.stop),
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,  # a stop string may be of such tokens
            "logprobs": 0,  # of the sampled token alone
            "return_token_ids": True,
        }

    def _completion(self, choice: dict[str, Any], request: dict[str, Any]) -> Completion:
        token_ids = choice["token_ids"]
        if choice["finish_reason"] == "length" and len(token_ids) < request["max_tokens"]:
            raise UserError(
                f"a rollout server ended a completion at {len(token_ids)} tokens where {request['max_tokens']} were "
                "asked for: its generation_config.json has max_new_tokens; start it with --generation-config vllm"
            )
        log_probs = choice["logprobs"]["token_logprobs"]
        return Completion(token_ids, log_probs, choice["finish_reason"], self.weights.version)

    def _in_parallel(self, work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
        """`work` of every item, in order. The first error ends it, once what runs already is done."""
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _everywhere(self, work: Callable[[StudentServer], T]) -> list[T]:
        return self._in_parallel(work, self.servers)

    def _by_first_rank(self, work: Callable[[], T]) -> T:
        """What `work` returns on the world's first rank, on all ranks; or RolloutFailed on all, with its UserError."""
        outcome: list[Any] = [None, None]
        if self.mesh.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        _raise_first(outcome[1:])
        return outcome[0]

    def _tell_replica(self, completions: list[Completion] | None) -> list[Completion]:
        """The speaker's completions on all ranks of its replica."""
        told = [completions]
        mesh = self.mesh
        # Each round has those ranks as senders that the rounds before have told.
        for group, take_part in (
            (mesh.cp, mesh.tp.rank() == mesh.pp.rank() == 0),
            (mesh.pp, mesh.tp.rank() == 0),
            (mesh.tp, True),
        ):
            if take_part and group.size() > 1:
                dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
        return told[0]


def _raise_first(problems: Iterable[str | None]) -> None:
    for problem in problems:
        if problem is not None:
            raise RolloutFailed(problem)

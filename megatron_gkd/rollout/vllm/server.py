"""Sampling by vLLM servers of their own: token ids over HTTP, weights through a folder or a group of processes.

One rank of each model replica talks to the servers and tells the others of its replica; the world's first rank gives
all servers new weights. Whatever goes wrong in one rank is raised in all of them together. Threads talk to servers, and
never to other ranks: only `load_weights` and the end of a generation are collectives, in the calling thread.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import httpx
from torch import Tensor

from megatron_gkd.errors import UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Completion, OnCompletion, RolloutFailed, Sampling, check_prompts
from megatron_gkd.rollout.vllm import weight_folder as vllm_weights
from megatron_gkd.rollout.vllm.adapters import AdapterFolder, adapter_name, hand_over_adapters
from megatron_gkd.rollout.vllm.client import Sampled, ServerNeeds, StudentRequirements, StudentServer, Weights
from megatron_gkd.rollout.vllm.logit_bias import logit_bias
from megatron_gkd.rollout.vllm.weight_folder import Shapes, WeightFolder
from megatron_gkd.rollout.vllm.weight_transfer import Keeper, WeightTransfer, wait_for_first_rank
from megatron_gkd.runtime.agreement import run_on_all, run_on_main
from megatron_gkd.runtime.background import in_background, parallel_map
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import ServedModel, open_client

_MOST_ROUNDS = 5  # in which a prompt is asked that a server answered with other weights than the student's

T = TypeVar("T")


@dataclass(frozen=True)
class ServedAdapters:
    """The adapters that servers are given.

    Attributes:
        config: adapter_config.json.
        shapes: of the factors by PEFT's names.
    """

    config: Mapping[str, Any]
    shapes: Shapes

    @property
    def rank(self) -> int:
        return max([int(self.config["r"]), *self.config["rank_pattern"].values()])


@dataclass(frozen=True)
class ServerOptions:
    """The servers, and how they are asked.

    Attributes:
        urls: of the servers' roots; prompts are dealt to them in turn.
        weight_sync_dir: the folder for weights; they see it under the same path.
        max_length: tokens of a prompt and its completion together.
        weight_sync: how they get weights: through that folder, sent over nccl or gloo, or adapters alone ("lora"),
            through that folder as well.
        adapters: what "lora" gives them; None with others.
        needs_fp32: they must compute in fp32.
        concurrency: requests of one replica at the same time, over all servers.
        timeout: seconds that one answer may take.
        patience: seconds that a server may be gone before the run stops.
    """

    urls: tuple[str, ...]
    weight_sync_dir: Path
    max_length: int
    weight_sync: Literal["folder", "nccl", "gloo", "lora"] = "folder"
    adapters: ServedAdapters | None = None
    needs_fp32: bool = False
    concurrency: int = 64
    timeout: float = 600.0
    patience: float = 300.0


class VllmServerEngine:
    """Waits until the servers answer. All ranks must make it together; `RolloutFailed` if a server does not serve.

    `checkpoint` is what the student began as: new weights have its names and shapes, and its EOS ends completions.
    """

    server_kind: type[StudentServer] = StudentServer

    def __init__(self, mesh: Mesh, checkpoint: Checkpoint, options: ServerOptions):
        self.mesh, self.checkpoint, self.options = mesh, checkpoint, options
        self.weights: Weights | None = None
        # On the last stage, where a teacher behind servers is asked: it can begin with what is finished.
        self.http: httpx.Client | None = None
        self.servers: list[StudentServer] = []
        self.sync: WeightFolder | WeightTransfer | None = self._build_sync() if mesh.is_main else None
        self._keeper: Keeper | None = None
        if self.mesh.is_leader or mesh.is_main:
            self.http = open_client(options.timeout, options.concurrency)
            self.servers = [
                self.server_kind(url, self.http, options.patience, self._hand_over()) for url in options.urls
            ]
        needs = ServerNeeds(
            options.max_length,
            transfer_backend=options.weight_sync if options.weight_sync in ("nccl", "gloo") else None,
            lora_rank=None if options.adapters is None else options.adapters.rank,
            needs_fp32=options.needs_fp32,
        )
        self.models: list[ServedModel] = run_on_main(
            lambda: parallel_map(lambda server: server.hello(needs), self.servers), RolloutFailed
        )
        for server, model in zip(self.servers, self.models, strict=False):  # none where no server is asked
            server.requirements = StudentRequirements(needs, model)

    def _build_sync(self) -> WeightFolder | WeightTransfer:
        optional = ("lm_head.weight",) if self.checkpoint.config.tie_word_embeddings else ()
        expected = self.checkpoint.shapes
        adapters = self.options.adapters
        if adapters is not None:
            return AdapterFolder(self.options.weight_sync_dir, adapters.shapes, adapters.config)
        if self.options.weight_sync == "folder":
            return WeightFolder(self.options.weight_sync_dir, expected, optional)
        return WeightTransfer(self.options.weight_sync, expected, optional, self.options.timeout)

    def _hand_over(self) -> Callable[[StudentServer], None]:
        if self.options.adapters is not None:
            return hand_over_adapters
        if self.options.weight_sync == "folder":
            return vllm_weights.hand_over
        return self.sync.hand_over if self.mesh.is_main else wait_for_first_rank

    def resident(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `RolloutEngine.load_weights`. `RolloutFailed` if a server can't load them, or is gone for too long."""
        if not self.mesh.is_main:
            for _ in named_tensors:  # making one takes all ranks
                pass
        self.weights = run_on_main(lambda: self.sync.load(named_tensors, version, self.servers), RolloutFailed)
        for server in self.servers:
            server.wanted = self.weights
        if self.mesh.is_main and self._keeper is None and isinstance(self.sync, WeightTransfer):
            self._keeper = Keeper(self.servers)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]) -> list[Completion]:
        """As `RolloutEngine.generate`. `RolloutFailed` if a server is gone for too long, or refuses a request."""
        return self.start(prompts, sampling, seeds).result()

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        on_completion: OnCompletion | None = None,
    ) -> ServerGeneration:
        """As `BackgroundEngine.start`."""
        check_prompts(prompts, seeds, self.checkpoint.vocab_size)
        version = 0 if self.weights is None else self.weights.version
        work = functools.partial(self._complete, prompts, sampling, seeds, version, on_completion)
        return ServerGeneration(self, in_background(work) if self.mesh.is_leader else None)

    def close(self) -> None:
        """Stop looking after the servers. They keep the weights that they have."""
        if self._keeper is not None:
            self._keeper.close()
        if isinstance(self.sync, WeightTransfer):
            self.sync.close()

    def _complete(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        version: int,
        on_completion: OnCompletion | None,
    ) -> tuple[list[Completion], float]:
        """The completions, and how many seconds they took."""
        served = self.models
        if self.options.adapters is not None:
            served = [replace(model, name=adapter_name(self.weights)) for model in served]
        first = self.mesh.dp.rank()  # replicas with few prompts do not all ask the same servers

        def complete(index: int) -> Completion:
            turn = (first + index) % len(self.servers)
            request = self._request(served[turn], prompts[index], sampling, seeds[index])
            completion = self._ask(self.servers[turn], request, version)
            if on_completion is not None:
                on_completion(index, completion)
            return completion

        start = time.perf_counter()
        completions = parallel_map(complete, range(len(prompts)), self.options.concurrency)
        return completions, time.perf_counter() - start

    def _ask(self, server: StudentServer, request: dict[str, Any], version: int) -> Completion:
        for _ in range(_MOST_ROUNDS):
            label, sampled = server.complete(request)
            if server.still_has(label):
                return self._completion(server, sampled, request, version)
        raise UserError(
            f"{server.url}: lost the student's weights {_MOST_ROUNDS} times while it answered the same prompt; look "
            "into its log, and whether another run uses it"
        )

    def _request(self, model: ServedModel, prompt: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """To /v1/completions. It names what a server would otherwise take from the model's generation_config.json."""
        eos = () if sampling.ignore_eos else self.checkpoint.eos_token_ids
        bias = logit_bias(sampling, self.checkpoint.vocab_size)
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
        } | ({} if bias is None else {"logit_bias": bias})

    def _completion(self, server: StudentServer, sampled: Sampled, request: dict[str, Any], version: int) -> Completion:
        token_ids, allowed = sampled.token_ids, self.checkpoint.vocab_size
        if sampled.finish_reason == "length" and len(token_ids) < request["max_tokens"]:
            raise UserError(
                f"{server.url}: ended a completion at {len(token_ids)} tokens where {request['max_tokens']} were "
                "asked for: its generation_config.json has max_new_tokens; start it with --generation-config vllm"
            )
        if max(token_ids) >= allowed:
            raise UserError(
                f"{server.url}: sampled the token id {max(token_ids)}; the student's are 0 to {allowed - 1}: does it "
                "serve the student's architecture?"
            )
        return Completion(token_ids, sampled.log_probs, sampled.finish_reason, version)


class ServerGeneration:
    """Completions that servers are at work on. `answer` is the leader rank's; it has them with the seconds they took."""

    def __init__(self, engine: VllmServerEngine, answer: Future[tuple[list[Completion], float]] | None):
        self.seconds = 0.0
        self._engine, self._answer = engine, answer

    def result(self) -> list[Completion]:
        """As `Generation.result`. `RolloutFailed` on all ranks if any replica's can't be had."""
        answer = run_on_all(lambda: None if self._answer is None else self._answer.result(), RolloutFailed)
        completions, self.seconds = self._engine.mesh.broadcast_from_leader(answer)
        return completions

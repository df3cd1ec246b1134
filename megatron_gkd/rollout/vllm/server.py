"""Sample with vLLM servers: token ids over HTTP, weights through a folder or a group of processes.

One rank of each model replica, its leader, sends requests and broadcasts the completions to its replica; the world's
main rank sends all servers new weights. A failure of one rank is raised in all of them together. Threads communicate
with servers, and never with other ranks: only `load_weights` and the end of a generation are collectives, in the
calling thread.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

import httpx
from torch import Tensor

from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.rollout.base import Completion, Images, OnCompletion, RolloutFailed, Sampling, check_prompts
from megatron_gkd.rollout.vllm.adapters import AdapterFolder, adapter_name, load_adapters_from_folder
from megatron_gkd.rollout.vllm.client import StudentServer, Weights
from megatron_gkd.rollout.vllm.completion_response import Sampled
from megatron_gkd.rollout.vllm.handshake import Handshake
from megatron_gkd.rollout.vllm.prompt import VllmPrompt, build_prompts
from megatron_gkd.rollout.vllm.requests import CompletionRequest, RequestBuilder
from megatron_gkd.rollout.vllm.server_options import RolloutServerOptions
from megatron_gkd.rollout.vllm.weight_folder import SharedWeights, WeightFolder, load_from_folder
from megatron_gkd.rollout.vllm.weight_transfer import HealthMonitor, WeightTransfer, wait_for_main_rank
from megatron_gkd.runtime.agreement import run_on_all, run_on_main
from megatron_gkd.runtime.background import in_background, parallel_map
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import ServedModel, open_client

_MAX_ROUNDS = 5  # of requests for a prompt that a server completes with other weights than the student's


@dataclass(frozen=True)
class _GenerationRequest:
    """The prompts of one generation, for the threads that complete them."""

    prompts: Sequence[VllmPrompt]
    sampling: Sampling
    seeds: Sequence[int]
    version: int
    on_completion: OnCompletion | None


class VllmServerEngine:
    """Rollout engine over vLLM servers. All ranks must make it together; it waits until the servers respond.

    Args:
        mesh: of the ranks.
        checkpoint: what the student began as: new weights have its names and shapes, and its EOS ends completions.
        options: the servers, and how they are used.
        images: what the student's processor makes of images; None for a text model.

    Raises:
        RolloutFailed: a server can not be used.
    """

    server_kind: type[StudentServer] = StudentServer

    def __init__(
        self, mesh: Mesh, checkpoint: Checkpoint, options: RolloutServerOptions, images: ImageProcessing | None = None
    ) -> None:
        self.mesh, self.checkpoint, self.options = mesh, checkpoint, options
        self.requests = RequestBuilder(checkpoint.vocab_size, checkpoint.eos_token_ids, images)
        self.weights: Weights | None = None
        self.http = run_on_all(self._open_client, RolloutFailed)
        self.servers: list[StudentServer] = []
        self.sync: WeightFolder | WeightTransfer | None = self._build_sync() if mesh.is_main else None
        self._monitor: HealthMonitor | None = None
        if self.http is not None:
            sender = self._build_sender()
            self.servers = [self.server_kind(url, self.http, options.max_downtime, sender) for url in options.urls]
        requirements = options.requirements()
        self.models: list[ServedModel] = run_on_main(
            lambda: parallel_map(lambda server: server.wait_until_ready(requirements), self.servers), RolloutFailed
        )
        for server, model in zip(self.servers, self.models, strict=False):  # other ranks have no servers
            server.handshake = Handshake(requirements, model)

    def _open_client(self) -> httpx.Client | None:
        """Return the client of a rank that sends requests; None for the others, which need the API key no less."""
        options = self.options
        api_key = options.api_key.read()
        needs_client = self.mesh.is_leader or self.mesh.is_main
        return open_client(options.timeout, options.concurrency, api_key) if needs_client else None

    def _build_sync(self) -> WeightFolder | WeightTransfer | None:
        """Build what sends weights from the main rank; None if the servers' weights never change."""
        options, expected = self.options, self.checkpoint.shapes
        optional = ("lm_head.weight",) if self.checkpoint.is_tied else ()
        if options.adapters is not None:
            return AdapterFolder(options.weight_sync_dir, options.adapters.shapes, options.adapters.config)
        if options.transfer_backend is None:
            return WeightFolder(options.weight_sync_dir, expected, optional)
        return WeightTransfer(options.transfer_backend, expected, optional, options.timeout)

    def _build_sender(self) -> Callable[[StudentServer], None]:
        """Build this rank's `send_weights` of a `StudentServer`."""
        if self.options.adapters is not None:
            return load_adapters_from_folder
        if self.options.transfer_backend is None:
            return load_from_folder
        return self.sync.send_to if isinstance(self.sync, WeightTransfer) else wait_for_main_rank

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing: the servers keep running."""
        return contextlib.nullcontext()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Let all servers load a version; see `RolloutEngine.load_weights`.

        Raises:
            RolloutFailed: a server can't load it, or is gone for too long.
        """
        if self.sync is None:
            for _ in named_tensors:  # making one takes all ranks
                pass
        self.weights = run_on_main(lambda: self._send_weights(named_tensors, version), RolloutFailed)
        for server in self.servers:
            server.wanted = self.weights
        if self._monitor is None and isinstance(self.sync, WeightTransfer):
            self._monitor = HealthMonitor(self.servers)

    def _send_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> Weights:
        if self.sync is None:
            raise RuntimeError("the main rank has no folder and no connection for weights")
        return self.sync.load(named_tensors, version, self.servers)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        images: Images | None = None,
    ) -> list[Completion]:
        """Generate one completion a prompt; see `RolloutEngine.generate`.

        Raises:
            RolloutFailed: a server is gone for too long, or refuses a request.
        """
        return self.start(prompts, sampling, seeds, images).result()

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        images: Images | None = None,
        on_completion: OnCompletion | None = None,
    ) -> ServerGeneration:
        """Start to generate in the background; see `BackgroundEngine.start`."""
        check_prompts(prompts, seeds, self.checkpoint.vocab_size, images)
        version = 0 if self.weights is None else self.weights.version
        built = build_prompts(prompts, images, self.requests.processing)
        request = _GenerationRequest(built, sampling, seeds, version, on_completion)
        return ServerGeneration(self, in_background(lambda: self._complete(request)) if self.mesh.is_leader else None)

    def close(self) -> None:
        """Stop monitoring the servers. They keep the weights that they have."""
        if self._monitor is not None:
            self._monitor.close()
        if isinstance(self.sync, WeightTransfer):
            self.sync.close()

    def _complete(self, request: _GenerationRequest) -> tuple[list[Completion], float]:
        """Return the completions, and how many seconds they took."""
        models = self.models
        if self.options.adapters is not None and isinstance(self.weights, SharedWeights):
            name = adapter_name(self.weights)
            models = [replace(model, name=name) for model in models]
        first = self.mesh.dp.rank()  # replicas with few prompts do not all use the same servers

        def complete(index: int) -> Completion:
            turn = (first + index) % len(self.servers)
            prompt, seed = request.prompts[index], request.seeds[index]
            one = self.requests.build(models[turn], prompt, request.sampling, seed)
            completion = self._complete_prompt(self.servers[turn], one, request.version)
            if request.on_completion is not None:
                request.on_completion(index, completion)
            return completion

        start = time.perf_counter()
        completions = parallel_map(complete, range(len(request.prompts)), self.options.concurrency)
        return completions, time.perf_counter() - start

    def _complete_prompt(self, server: StudentServer, request: CompletionRequest, version: int) -> Completion:
        for _ in range(_MAX_ROUNDS):
            label, sampled = server.complete(request)
            if server.still_has(label):
                return self._build_completion(server, sampled, request.max_tokens, version)
        raise ServiceError(
            f"{server.url}: lost the student's weights {_MAX_ROUNDS} times while it completed the same prompt; look "
            "into its log, and whether another run uses it"
        )

    def _build_completion(self, server: StudentServer, sampled: Sampled, max_tokens: int, version: int) -> Completion:
        token_ids, vocab_size = sampled.token_ids, self.checkpoint.vocab_size
        if sampled.finish_reason == "length" and len(token_ids) < max_tokens:
            raise UserError(
                f"{server.url}: ended a completion at {len(token_ids)} tokens where {max_tokens} were "
                "requested: its generation_config.json has max_new_tokens; start it with --generation-config vllm"
            )
        if max(token_ids) >= vocab_size:
            raise UserError(
                f"{server.url}: sampled the token id {max(token_ids)}; the student's are 0 to {vocab_size - 1}: does "
                "it serve the student's architecture?"
            )
        return Completion(token_ids, sampled.log_probs, sampled.finish_reason, version)


class ServerGeneration:
    """Completions that servers are generating.

    Args:
        engine: of the servers.
        future: on the leader rank, the completions and the seconds that they took; None on other ranks.
    """

    def __init__(self, engine: VllmServerEngine, future: Future[tuple[list[Completion], float]] | None) -> None:
        self.seconds = 0.0
        self._engine, self._future = engine, future

    def result(self) -> list[Completion]:
        """Wait for the completions; see `Generation.result`.

        Raises:
            RolloutFailed: on all ranks; the completions of a replica can't be generated.
        """
        result = run_on_all(lambda: None if self._future is None else self._future.result(), RolloutFailed)
        completions, self.seconds = self._engine.mesh.broadcast_from_leader(result)
        return completions

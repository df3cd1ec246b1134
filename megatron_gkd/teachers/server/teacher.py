"""A teacher behind vLLM servers: the top-k of its distributions over HTTP.

The leader of each model replica sends the requests and broadcasts the responses to the other ranks of its last pipeline
stage. Requests start as soon as samples are known, up to a step ahead of the student. A failure in one rank is raised
in all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_gkd.config.api_keys import NO_API_KEY, ApiKeyVariable
from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.data.sample import Sample
from megatron_gkd.data.teacher_view import teacher_view
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.errors import GkdError, ServiceError
from megatron_gkd.models.tokenizer_comparison import Mode
from megatron_gkd.ops.topk import MISSING, TopK
from megatron_gkd.runtime.agreement import run_on_all, run_on_main
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.servers import open_client
from megatron_gkd.teachers.base import TeacherFailed
from megatron_gkd.teachers.server.client import TeacherRequirements, TeacherServer, handshake_all, warn_of_tokenizers
from megatron_gkd.teachers.server.requests import RequestDispatcher
from megatron_gkd.teachers.server.response import ScoreRequest, Scores
from megatron_gkd.teachers.server.tokenizer import tokenizer_probes

_MAX_AHEAD = 4  # pending requests that are kept, as a multiple of those of the largest scoring


@dataclass(frozen=True)
class TeacherServerOptions:
    """The servers, and how they are used.

    Attributes:
        urls: the servers' roots; they get requests in turn.
        k: tokens of each distribution.
        max_length: tokens of the longest sequence.
        has_images: whether rows have images, which the servers must be able to read.
        concurrency: requests of one replica at the same time, over all servers.
        timeout: seconds that one response may take.
        max_downtime: seconds that servers may be unreachable before the run stops.
        check_interval: number of scorings between two checks that every server still has the same model.
        api_key: the variable with the servers' API key.
        check_tokenizers: whether servers with another tokenizer than the student's are refused (strict).
        differences_file: for the list of such differences; see `report_differences`.
    """

    urls: tuple[str, ...]
    k: int
    max_length: int
    has_images: bool = False
    concurrency: int = 64
    timeout: float = 600.0
    max_downtime: float = 300.0
    check_interval: int = 10
    api_key: ApiKeyVariable = NO_API_KEY
    check_tokenizers: Mode = "strict"
    differences_file: Path | None = None


@dataclass(frozen=True)
class _ExchangePlan:
    """Which requests a replica collects, and which responses replicas exchange.

    Attributes:
        own: requests whose responses this replica collects.
        owners: data-parallel rank that collects the response for others, by the request's key; the same on all leaders.
    """

    own: list[ScoreRequest]
    owners: dict[bytes, int]


def _open_client(options: TeacherServerOptions, mesh: Mesh) -> httpx.Client | None:
    """Return the client of a rank that sends requests; None for the others, which need the API key no less."""
    api_key = options.api_key.read()
    needs_client = mesh.is_leader or mesh.is_main
    return open_client(options.timeout, options.concurrency, api_key) if needs_client else None


class ServerTeacher:
    """A teacher behind vLLM servers. All ranks must create it together, which waits until the servers respond.

    Args:
        mesh: the groups of the student.
        tokenizer: the student's, which the servers' must equal, as `options.check_tokenizers` says.
        vocab_size: tokens with ids from here on are missing entries.
        options: the servers, and how they are used.
        images: what the student's processor makes of images; None for a text model.

    Attributes:
        dispatcher: on the leader of each model replica; None elsewhere.

    Raises:
        TeacherFailed: in all ranks; a server cannot be used.
    """

    def __init__(
        self,
        mesh: Mesh,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        options: TeacherServerOptions,
        images: ImageProcessing | None = None,
    ) -> None:
        self.mesh, self.vocab_size, self.options, self.images = mesh, vocab_size, options, images
        self.dispatcher: RequestDispatcher | None = None
        self._largest_scoring = options.concurrency  # number of requests
        self._num_scorings = 0
        http = run_on_all(lambda: _open_client(options, mesh), TeacherFailed)
        servers: list[TeacherServer] = []
        if http is not None:
            processing = images if options.has_images else None
            probes = tokenizer_probes(tokenizer)
            needs = TeacherRequirements(options.k, options.max_length, probes, processing, options.check_tokenizers)
            servers = [TeacherServer(url, http, needs) for url in options.urls]
        identities = run_on_main(lambda: handshake_all(servers, options.max_downtime), TeacherFailed)
        if mesh.is_main:
            warn_of_tokenizers(servers, identities, options.differences_file)
        if mesh.is_leader:
            for server, identity in zip(servers, identities, strict=True):
                server.identity = identity
            self.dispatcher = RequestDispatcher(
                servers, concurrency=options.concurrency, max_downtime=options.max_downtime, first=mesh.dp.rank()
            )

    def resident(self) -> contextlib.AbstractContextManager[None]:
        """See ``TeacherSource.resident``; there is nothing to load."""
        return contextlib.nullcontext()

    def begin(self, samples: Iterable[Sample]) -> None:
        """See ``ScoresAhead.begin``."""
        if self.dispatcher is not None:
            with contextlib.suppress(GkdError):  # `score` builds the request again, and raises it in all ranks
                self.dispatcher.begin(filter(None, map(self._build_request, samples)))

    def score(self, microbatches: Sequence[Microbatch]) -> list[TopK | None]:
        """See ``TeacherSource.score``; values are log-probabilities at temperature 1, [N, k]."""
        samples = [sample for microbatch in microbatches for sample in microbatch.samples]
        built = run_on_all(lambda: list(map(self._build_request, samples)), TeacherFailed)
        requests = [request for request in built if request is not None]
        scores = self._collect(requests)
        if not self.mesh.is_last_stage:
            return [None] * len(microbatches)
        whole = self._broadcast_on_last_stage(scores, requests, microbatches[0].labels.device)
        pieces = whole.split([microbatch.num_labels for microbatch in microbatches], dim=1)
        return [self._build_signal(piece, one) for piece, one in zip(pieces, microbatches, strict=True)]

    def _collect(self, requests: Sequence[ScoreRequest]) -> dict[bytes, Scores]:
        """Return the responses by key on the leader, nothing elsewhere. All ranks call it together."""
        dispatcher = self.dispatcher
        plan = None if dispatcher is None else self._plan_exchange(dispatcher, requests)
        scores = run_on_all(
            lambda: {} if dispatcher is None or plan is None else dispatcher.collect(plan.own), TeacherFailed
        )
        if dispatcher is not None:
            self._largest_scoring = max(self._largest_scoring, len({request.key for request in requests}))
            dispatcher.forget_all_but(_MAX_AHEAD * self._largest_scoring)
        self._check_servers()
        if plan is not None and plan.owners:
            scores |= self._exchange(plan, scores)
        return scores

    def _plan_exchange(self, dispatcher: RequestDispatcher, requests: Sequence[ScoreRequest]) -> _ExchangePlan:
        """Plan which replica collects what: one may need samples that another has requested when it sampled them.

        The leaders of all replicas call it together.
        """
        needed = {request.key: request for request in requests}
        pending = dispatcher.pending()
        if self.mesh.dp.size() == 1:
            return _ExchangePlan(list(needed.values()), {})
        offers: list[tuple[set[bytes], set[bytes]]] = [(set(), set())] * self.mesh.dp.size()
        offer = (set(needed.keys() - pending.keys()), set(pending.keys() - needed.keys()))
        dist.all_gather_object(offers, offer, group=self.mesh.dp)
        missing: set[bytes] = set().union(*(keys for keys, _ in offers))
        owners = {key: rank for rank, (_, spare) in enumerate(offers) for key in spare & missing}
        owners = dict(sorted(owners.items()))
        own = [request for key, request in needed.items() if key in pending or key not in owners]
        own += [pending[key] for key, owner in owners.items() if owner == self.mesh.dp.rank()]
        return _ExchangePlan(own, owners)

    def _exchange(self, plan: _ExchangePlan, scores: dict[bytes, Scores]) -> dict[bytes, Scores]:
        """Return the responses that replicas have collected for others. All replicas' leaders call it together."""
        replicas = self.mesh.dp
        offered = {key: scores[key] for key, owner in plan.owners.items() if owner == replicas.rank()}
        gathered: list[dict[bytes, Scores]] = [{} for _ in range(replicas.size())]
        dist.all_gather_object(gathered, offered, group=replicas)
        return {key: score for part in gathered for key, score in part.items()}

    def _check_servers(self) -> None:
        """Check in every `check_interval`-th scoring that the servers have the same model; each by one replica.

        It follows the responses, so that it covers those of this scoring, too. All ranks call it together.
        """
        self._num_scorings += 1
        if self._num_scorings % self.options.check_interval:
            return

        def check() -> None:
            servers = [] if self.dispatcher is None else self.dispatcher.servers
            try:
                for server in servers[self.mesh.dp.rank() :: self.mesh.dp.size()]:
                    server.check()
            except GkdError as error:
                since = f"; {self.options.check_interval} steps at most were scored since the last check"
                raise ServiceError(f"{error}{since if self.options.check_interval > 1 else ''}") from error

        run_on_all(check, TeacherFailed)

    def _broadcast_on_last_stage(
        self, scores: dict[bytes, Scores], requests: Sequence[ScoreRequest], device: torch.device
    ) -> Tensor:
        """Return int32 [2, labels of all microbatches, k]: ids, and the bits of log-probabilities."""
        num_labels = sum(len(request.positions) for request in requests)
        packed = torch.empty(2, num_labels, self.options.k, dtype=torch.int32)
        if self.mesh.is_leader and requests:
            in_order = [scores[request.key] for request in requests]
            np.concatenate([one.ids for one in in_order], out=packed[0].numpy())
            np.concatenate([one.log_probs for one in in_order], out=packed[1].view(torch.float32).numpy())
        packed = packed.to(device)
        for group, takes_part in ((self.mesh.cp, self.mesh.tp.rank() == 0), (self.mesh.tp, True)):
            if takes_part and group.size() > 1 and packed.numel():
                dist.broadcast(packed, src=dist.get_global_rank(group, 0), group=group)
        return packed

    def _build_signal(self, packed: Tensor, microbatch: Microbatch) -> TopK:
        """Return this rank's rows of a microbatch's [2, labels, k]."""
        indices = local_label_indices(microbatch, self.mesh.cp.rank(), self.mesh.cp.size()).to(packed.device)
        ids, log_probs = packed[0, indices].long(), packed[1, indices].view(torch.float32)
        return TopK.from_log_probs(ids.masked_fill(ids >= self.vocab_size, MISSING), log_probs)

    def _build_request(self, sample: Sample) -> ScoreRequest | None:
        """Build the request for the sequence that the teacher reads; None for a sample without labels."""
        return ScoreRequest.from_sample(teacher_view(sample), self.images)

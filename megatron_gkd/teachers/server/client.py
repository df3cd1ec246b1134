"""Client of one vLLM server of a teacher: log-probabilities of given tokens over HTTP, always of the same model.

A server that comes back after a lost connection may serve another model under the same name. So the handshake is
repeated after each, and the log-probabilities of a known prompt are compared with those of the first handshake. A
restart between two scorings loses no connection that is in use: the prompt is compared after a pause, too.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import numpy as np

from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.vllm_settings import describe_remedy
from megatron_gkd.errors import ServiceError, UserError
from megatron_gkd.models.tokenizer_comparison import Difference, Mode, report_differences
from megatron_gkd.runtime.background import parallel_map
from megatron_gkd.runtime.servers import Backoff, Server, ServerDown
from megatron_gkd.teachers.server.images import image_probe
from megatron_gkd.teachers.server.response import (
    ScoreRequest,
    Scores,
    mean_difference,
    parse_response,
)
from megatron_gkd.teachers.server.routes import request_scores, route_of
from megatron_gkd.teachers.server.tokenizer import MAX_DIFFERENCES, Probe, compare_server

_KNOWN_PROMPT_LENGTH = 32  # tokens at most
_MAX_PAUSE = 10.0  # seconds without a response in which a server can't restart: vLLM takes longer
_MAX_DIFFERENCE = 0.1
"""Largest mean difference of the log-probabilities of one model, in nats. Kernels whose results depend on the batch
cause a tenth of it in bf16."""

T = TypeVar("T")


class TeacherBackoff(Backoff):
    """The pauses between attempts at a teacher's servers."""

    key = "teacher.teacher_server_max_downtime_s"


@dataclass(frozen=True)
class TeacherRequirements:
    """What a server must provide.

    Attributes:
        k: tokens of each distribution.
        max_length: tokens of the longest sequence.
        probes: texts with their ids and tokens in the student's tokenizer, which the server's must equal.
        images: what the student's processor makes of images, where rows have some; the server must make the same.
        check_tokenizers: whether a server with another tokenizer is refused (strict).
    """

    k: int
    max_length: int
    probes: Sequence[Probe]
    images: ImageProcessing | None = None
    check_tokenizers: Mode = "strict"

    def known_prompt(self) -> ScoreRequest:
        """Build the request that identifies a server's model."""
        length = min(_KNOWN_PROMPT_LENGTH, self.max_length)
        ids = np.array([i for probe in self.probes for i in probe.ids][:length])
        return ScoreRequest(ids, np.arange(len(ids) - 1))

    def image_probe(self) -> ScoreRequest | None:
        """Build the request that shows whether a server reads images; None where no row has one.

        It is None, too, where the image's tokens don't fit into a sequence.
        """
        if self.images is None:
            return None
        probe = image_probe(self.known_prompt().token_ids[:4], self.images)
        return probe if len(probe.token_ids) <= self.max_length else None


@dataclass(frozen=True)
class ModelIdentity:
    """A server's model, identified by its name and its distributions after each token of the known prompt.

    Attributes:
        name: as the server lists it.
        scores: of the known prompt.
        differences: of its tokenizer from the student's, as far as the probes show them; at most `MAX_DIFFERENCES`.
    """

    name: str
    scores: Scores
    differences: tuple[Difference, ...] = ()


class TeacherServer(Server):
    """One server of a teacher.

    Args:
        url: root of the server.
        http: may be shared between servers and threads.
        requirements: what the server must provide.

    Attributes:
        identity: of the first handshake, in this rank or in another; scoring needs it.
        down_since: time of the newest failure (`time.monotonic`), if the server has not responded since.
    """

    api_key_env = "teacher.teacher_server_api_key_env"

    def __init__(self, url: str, http: httpx.Client, requirements: TeacherRequirements) -> None:
        super().__init__(url, http)
        self.requirements, self.k = requirements, requirements.k
        self.identity: ModelIdentity | None = None
        self.down_since: float | None = None
        self._known_prompt, self._image_probe = requirements.known_prompt(), requirements.image_probe()
        self._name: str | None = None
        self._losses = self._losses_checked = 0  # lost connections; those that a handshake has followed
        self._lock = threading.Lock()  # held during a handshake
        self._newest_response = time.monotonic()
        self._pause_lock = threading.Lock()  # held while the model is compared after a pause

    def handshake(self, max_downtime: float) -> ModelIdentity:
        """Make the first handshake, which is retried for `max_downtime` seconds.

        Raises:
            ServiceError: the server does not respond, or what responds is no vLLM server.
            UserError: it cannot score for this student: sequences shorter than `max_length`, another tokenizer (where
                `check_tokenizers` is strict), fewer log-probabilities than `k`, or other tokens of images or none.
        """
        self.identity = _retry(self._handshake, max_downtime)
        return self.identity

    def score(self, request: ScoreRequest) -> Scores:
        """Return the log-probabilities of one request, after a new handshake where the connection was lost.

        Raises:
            ServerDown: the request may succeed later, or at another server.
            UserError: the server refuses the request.
            ServiceError: the response is invalid, or the server serves another model than at first.
        """
        self._ensure_same_model()
        try:
            self._compare_after_pause()
            scores = self._score(request)
        except ServerDown:
            self.down_since = time.monotonic()
            self._losses += 1
            raise
        self._ensure_same_model()  # another thread's connection may have been lost before this response was sent
        self.down_since = None
        return scores

    def check(self) -> None:
        """Score the known prompt again; a server that is down is not checked.

        Raises:
            ServiceError: the server serves another model than at first.
        """
        with suppress(ServerDown):
            self._require_same_model(self.score(self._known_prompt))

    def verify(self, max_downtime: float) -> None:
        """Score the known prompt again, which is retried for `max_downtime` seconds.

        Raises:
            ServiceError: the server does not respond, or it serves another model than at first.
        """
        _retry(lambda: self._require_same_model(self.score(self._known_prompt)), max_downtime)

    def _handshake(self) -> ModelIdentity:
        model = self.served_model()
        self._name, needed = model.name, self.requirements.max_length
        if model.max_model_len <= needed:  # a request has to sample a token, too
            raise UserError(
                f"{self.url}: serves sequences of up to {model.max_model_len} tokens; it needs one more than "
                f"data.max_length = {needed}: start it with --max-model-len {needed + 1}"
            )
        self.require_running()
        differences = compare_server(self, model.name, self.requirements.probes)
        if self.requirements.check_tokenizers == "strict":
            report_differences(differences, self.url, "strict", is_whole=len(differences) < MAX_DIFFERENCES)
        if self._image_probe is not None:
            self._score(self._image_probe)
        return ModelIdentity(model.name, self._score(self._known_prompt), differences)

    def _ensure_same_model(self) -> None:
        """Make a handshake if a connection was lost since the newest one."""
        if self._losses == self._losses_checked:
            return
        if not self._lock.acquire(blocking=False):
            raise ServerDown(f"{self.url}: is being checked after a lost connection")
        try:
            losses = self._losses
            self._require_same_model(self._handshake().scores)
            self._losses_checked = losses
        except ServerDown:
            self.down_since = time.monotonic()
            raise
        finally:
            self._lock.release()

    def _compare_after_pause(self) -> None:
        """Score the known prompt again if the server may have been restarted since its newest response."""
        with self._pause_lock:
            if time.monotonic() - self._newest_response > _MAX_PAUSE:
                self._name = self.served_model().name
                scores = self._score(self._known_prompt)
                self._newest_response = -math.inf  # until it is known to be of the same model
                self._require_same_model(scores)
                self._newest_response = time.monotonic()

    def _require_same_model(self, scores: Scores) -> None:
        identity = self._known_identity()
        difference = mean_difference(identity.scores, scores)
        if difference > _MAX_DIFFERENCE:
            raise ServiceError(
                f"{self.url}: serves another model than at the start of the run (as {self._name}): its "
                f"log-probabilities of the same prompt differ by {difference:.3g} nats on average, allowed are "
                f"{_MAX_DIFFERENCE:g}; start it with the model that it served ({identity.name})"
            )

    def _known_identity(self) -> ModelIdentity:
        if self.identity is None:
            raise ValueError(f"{self.url}: has no identity; make a handshake before scoring")
        return self.identity

    def _score(self, request: ScoreRequest) -> Scores:
        prompt = request_scores(self, self._name or self._known_identity().name, request, self.k)
        self._newest_response = time.monotonic()
        try:
            return parse_response(prompt, request, self.k)
        except UserError as error:
            raise UserError(f"{self.url}: {error}{describe_remedy(self.requirements.images)}") from error
        except ServiceError as error:
            raise ServiceError(f"{self.url}{route_of(request)}: {error}") from error


def _retry(attempt: Callable[[], T], max_downtime: float) -> T:
    """Return the result of `attempt`, which is retried while it raises ServerDown, for `max_downtime` seconds."""
    backoff = TeacherBackoff(max_downtime)
    while True:
        try:
            return attempt()
        except ServerDown as error:
            backoff.wait(error)


def handshake_all(servers: Sequence[TeacherServer], max_downtime: float) -> list[ModelIdentity]:
    """Make the first handshake with all servers at the same time.

    Raises:
        GkdError: a handshake fails; see ``TeacherServer.handshake``.
        UserError: the servers serve different models.
    """
    identities = parallel_map(lambda server: server.handshake(max_downtime), servers)
    for server, identity in zip(servers[1:], identities[1:], strict=True):
        difference = mean_difference(identity.scores, identities[0].scores)
        if difference > _MAX_DIFFERENCE:
            raise UserError(
                f"{server.url} and {servers[0].url}: serve different models; their log-probabilities of one prompt "
                f"differ by {difference:.3g} nats on average, allowed are {_MAX_DIFFERENCE:g}"
            )
    return identities


def warn_of_tokenizers(
    servers: Sequence[TeacherServer], identities: Sequence[ModelIdentity], file: Path | None = None
) -> None:
    """Warn of servers whose tokenizer differs from the student's; of the same differences once.

    Args:
        servers: where such servers are not refused.
        identities: of their first handshakes.
        file: for the list of differences; see `report_differences`.
    """
    warned: set[tuple[Difference, ...]] = set()
    for server, identity in zip(servers, identities, strict=True):
        found = identity.differences
        if found not in warned:
            warned.add(found)
            report_differences(found, server.url, "warn", file, is_whole=len(found) < MAX_DIFFERENCES)

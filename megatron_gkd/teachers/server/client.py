"""One vLLM server of a teacher: log-probabilities of given tokens over HTTP, always of the same model.

A server that comes back after a lost connection may serve another model under the same name. So the handshake is
repeated after each, and the log-probabilities of a known prompt are compared with those of the first handshake.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import httpx
import msgspec
import numpy as np

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import servers
from megatron_gkd.runtime.servers import Server, ServerDown
from megatron_gkd.teachers.server.response import ANSWER, Question, Scores, mean_difference, read_answer
from megatron_gkd.teachers.server.tokenizer import Probe, require_same_tokens

_KNOWN_PROMPT = 32  # tokens at most
_SAME_MODEL = 0.1
"""Nats by which log-probabilities of one model may differ, on average. Kernels that depend on the batch make a tenth of
it in bf16."""


class Patience(servers.Backoff):
    key = "teacher.teacher_server_max_downtime_s"


@dataclass(frozen=True)
class TeacherRequirements:
    """What a server must be able to do.

    Attributes:
        k: tokens of each distribution that it gives.
        max_length: tokens of the longest sequence.
        probes: texts with their ids and tokens in the student's tokenizer, which the server's must equal.
    """

    k: int
    max_length: int
    probes: Sequence[Probe]

    def known_prompt(self) -> Question:
        ids = np.array([i for probe in self.probes for i in probe.ids][: min(_KNOWN_PROMPT, self.max_length)])
        return Question(ids, np.arange(len(ids) - 1))


@dataclass(frozen=True)
class Identity:
    """What tells a server's model: its name, and its distributions after each token of the known prompt."""

    name: str
    scores: Scores


class _Tokens(msgspec.Struct):
    tokens: list[int]
    token_strs: list[str | None]


class TeacherServer(Server):
    """`http` may be shared between servers and threads."""

    def __init__(self, url: str, http: httpx.Client, requirements: TeacherRequirements):
        super().__init__(url, http)
        self.requirements, self.k = requirements, requirements.k
        self.identity: Identity | None = None
        """Of the first handshake, in this rank or in another; scoring needs it."""
        self.down_since: float | None = None
        """When it failed last (`time.monotonic`), if it has not answered since."""
        self._known_prompt = requirements.known_prompt()
        self._name: str | None = None
        self._losses = self._losses_checked = 0  # lost connections; those that a handshake has followed
        self._lock = threading.Lock()  # held during a handshake

    def hello(self, patience: float) -> Identity:
        """Wait until the server answers, for `patience` seconds, and make the first handshake.

        Raises:
            UserError: it does not answer, or it can't score for this student: sequences shorter than `max_length`,
                another tokenizer (see `server_tokenizer`), fewer log-probabilities than `k`, or of another kind.
        """
        bearing = Patience(patience)
        while True:
            try:
                self.identity = self._handshake()
                return self.identity
            except ServerDown as error:
                bearing.wait(error)

    def score(self, question: Question) -> Scores:
        """Return what the server says of one question, after a new handshake where the connection was lost.

        Raises:
            ServerDown: it may work later, or at another server.
            UserError: the server refuses it, what it says makes no sense, or it serves another model than it did.
        """
        self._ensure_same_model()
        try:
            scores = self._score(question)
        except ServerDown:
            self.down_since = time.monotonic()
            self._losses += 1
            raise
        self._ensure_same_model()  # another thread's connection may have been lost before this answer was sent
        self.down_since = None
        return scores

    def check(self) -> None:
        """Score the known prompt again. UserError if it is another model's; a server that is down is not checked."""
        with suppress(ServerDown):
            self._require_same_model(self.score(self._known_prompt))

    def verify(self, patience: float) -> None:
        """As `check`, but a server that is down is waited for, for `patience` seconds."""
        bearing = Patience(patience)
        while True:
            try:
                return self._require_same_model(self.score(self._known_prompt))
            except ServerDown as error:
                bearing.wait(error)

    def _handshake(self) -> Identity:
        model = self.served_model()
        self._name, needed = model.name, self.requirements.max_length
        if model.max_model_len <= needed:  # a request has to sample a token, too
            raise UserError(
                f"{self.url}: serves sequences of up to {model.max_model_len} tokens; it needs one more than "
                f"data.max_length = {needed}: start it with --max-model-len {needed + 1}"
            )
        self.require_running()
        for probe in self.requirements.probes:
            self._compare(probe)
        return Identity(model.name, self._score(self._known_prompt))

    def _compare(self, probe: Probe) -> None:
        body = {"model": self._name, "prompt": probe.text, "add_special_tokens": False, "return_token_strs": True}
        answer = self.request("POST", "/tokenize", _Tokens, hint="check that a vLLM server listens there", json=body)
        try:
            require_same_tokens(probe, answer.tokens, answer.token_strs)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from error

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

    def _require_same_model(self, scores: Scores) -> None:
        difference = mean_difference(self.identity.scores, scores)
        if difference > _SAME_MODEL:
            raise UserError(
                f"{self.url}: serves another model than at the start of the run (as {self._name}): its "
                f"log-probabilities of the same prompt differ by {difference:.3g} nats on average, allowed are "
                f"{_SAME_MODEL:g}; start it with the model that it served ({self.identity.name})"
            )

    def _score(self, question: Question) -> Scores:
        path = "/v1/completions"
        body = {
            "model": self._name or self.identity.name,
            "prompt": question.token_ids.tolist(),
            "prompt_logprobs": self.k,
            "max_tokens": 1,  # 0 is refused
            "temperature": 0.0,  # of the token that is sampled; log-probabilities are always those at 1
            "return_token_ids": True,
        }
        try:
            answer = self.request("POST", path, ANSWER, json=body)
        except UserError as error:
            too_many = f"; for {self.k} tokens (distill.gkd_logits_topk) start it with --max-logprobs {self.k}"
            raise UserError(f"{error}{too_many if 'max allowed' in str(error) else ''}") from error
        try:
            return read_answer(answer, question, self.k)
        except UserError as error:
            raise UserError(f"{self.url}{path}: {error}") from error


def handshake_all(teachers: Sequence[TeacherServer], patience: float) -> list[Identity]:
    """Make the first handshake with all servers at the same time. UserError if one fails, or their models differ."""
    with ThreadPoolExecutor(len(teachers)) as pool:
        identities = list(pool.map(lambda server: server.hello(patience), teachers))
    for server, identity in zip(teachers[1:], identities[1:], strict=True):
        difference = mean_difference(identity.scores, identities[0].scores)
        if difference > _SAME_MODEL:
            raise UserError(
                f"{server.url} and {teachers[0].url}: serve different models; their log-probabilities of one prompt "
                f"differ by {difference:.3g} nats on average, allowed are {_SAME_MODEL:g}"
            )
    return identities

"""One vLLM server of a teacher: log-probabilities of given tokens over HTTP."""

from __future__ import annotations

import time
from typing import Annotated, Any, TypeVar

import httpx
import msgspec
import numpy as np

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import servers
from megatron_gkd.runtime.servers import ServerDown, exchange
from megatron_gkd.teachers.server_answer import Question, Scores, read_answer
from megatron_gkd.teachers.server_tokenizer import Probe, require_same_tokens

_KNOWN_PROMPT = 32  # tokens at most

T = TypeVar("T")


class Patience(servers.Patience):
    key = "teacher.teacher_server_patience_s"


class _Card(msgspec.Struct):
    id: str
    max_model_len: int


class _Models(msgspec.Struct):
    data: Annotated[list[_Card], msgspec.Meta(min_length=1)]


class _Tokens(msgspec.Struct):
    tokens: list[int]
    token_strs: list[str | None]


class TeacherServer:
    """`http` may be shared between servers and threads; `k` tokens of each distribution are asked for."""

    def __init__(self, url: str, http: httpx.Client, k: int):
        self.url, self.k = url.rstrip("/"), k
        self.model: str | None = None
        """The name that it serves the teacher under; known after `hello`, or as another rank was told."""
        self.down_since: float | None = None
        """When it failed last (`time.monotonic`), if it has not answered since."""
        self._http = http

    def hello(self, max_length: int, probes: list[Probe], patience: float) -> Scores:
        """Wait until the server answers, for `patience` seconds. Returns what it says of a known prompt.

        Raises:
            UserError: it does not, or it can't judge this student: sequences shorter than `max_length`, another
                tokenizer (see `server_tokenizer`), fewer log-probabilities than `k`, or of another kind.
        """
        bearing = Patience(patience)
        while True:
            try:
                return self._hello(max_length, probes)
            except ServerDown as error:
                bearing.wait(error)

    def _hello(self, max_length: int, probes: list[Probe]) -> Scores:
        card = self._ask("GET", "/v1/models", _Models).data[0]
        self.model = card.id
        if card.max_model_len <= max_length:  # a request has to sample a token, too
            raise UserError(
                f"{self.url}: serves sequences of up to {card.max_model_len} tokens; it needs one more than "
                f"data.max_length = {max_length}: start it with --max-model-len {max_length + 1}"
            )
        for probe in probes:
            self._compare(probe)
        ids = np.array([i for probe in probes for i in probe.ids][: min(_KNOWN_PROMPT, max_length)])
        return self.score(Question(ids, np.arange(len(ids) - 1)))

    def _compare(self, probe: Probe) -> None:
        body = {"model": self.model, "prompt": probe.text, "add_special_tokens": False, "return_token_strs": True}
        answer = self._ask("POST", "/tokenize", _Tokens, json=body)
        try:
            require_same_tokens(probe, answer.tokens, answer.token_strs)
        except UserError as error:
            raise UserError(f"{self.url}: {error}") from error

    def score(self, question: Question) -> Scores:
        """One request.

        Raises:
            ServerDown: it may work later, or at another server.
            UserError: the server refuses it, or what it says makes no sense.
        """
        body = {
            "model": self.model,
            "prompt": question.token_ids.tolist(),
            "prompt_logprobs": self.k,
            "max_tokens": 1,  # 0 is refused
            "temperature": 0.0,  # of the token that is sampled; log-probabilities are always those at 1
            "return_token_ids": True,
        }
        url = f"{self.url}/v1/completions"
        try:
            content = exchange(self._http, "POST", url, json=body)
        except ServerDown:
            self.down_since = time.monotonic()
            raise
        except UserError as error:
            too_many = f"; for distill.gkd_logits_topk = {self.k} start it with --max-logprobs {self.k}"
            raise UserError(f"{error}{too_many if 'logprobs' in str(error) else ''}") from error
        self.down_since = None
        try:
            return read_answer(content, question, self.k)
        except UserError as error:
            raise UserError(f"{url}: {error}") from error

    def _ask(self, method: str, path: str, kind: type[T], **options: Any) -> T:
        hint = "is it a vLLM server?"
        content = exchange(self._http, method, self.url + path, hint=hint, **options)
        try:
            return msgspec.json.decode(content, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise UserError(f"{self.url}{path}: {error} in {content[:200]!r}; {hint}") from error

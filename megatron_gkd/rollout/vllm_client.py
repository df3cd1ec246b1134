"""One vLLM server as the trainer sees it: completions by token ids, and weights that are always the student's newest.

A server that was restarted has the weights that it began with, and says nothing about it. So every loading leaves a
label of its own there (vLLM's "weight version"), and a completion counts if the server still has the label afterwards
that it had when the completion was asked for (`StudentServer.complete`, `StudentServer.current_label`).
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import servers
from megatron_gkd.runtime.servers import ServerDown, exchange


class Patience(servers.Patience):
    key = "rollout.server_patience_s"


@dataclass(frozen=True)
class Weights:
    """One version of the student's weights. `version` is as given to `RolloutEngine.load_weights`; `label` names run
    and version to a server."""

    version: int
    label: str


@dataclass(frozen=True)
class ServedModel:
    """What a server says about itself. max_model_len: tokens of prompt and completion together."""

    name: str
    max_model_len: int


class StudentServer:
    """`http` may be shared between servers and threads. `patience` is in seconds, for each task.

    `hand_over(server)` pauses the server and gives it the weights that are `wanted`. It raises ServerDown if that does
    not work now, and UserError if it never will.
    """

    def __init__(self, url: str, http: httpx.Client, patience: float, hand_over: Callable[[StudentServer], None]):
        self.url, self.patience = url.rstrip("/"), patience
        self.wanted: Weights | None = None
        self.label: str | None = None
        """What the server said when it was last seen to have the wanted weights."""
        self.lock = threading.Lock()
        """Of whoever looks after the server's weights."""
        self._http, self._hand_over = http, hand_over

    def hello(self, max_length: int, transfer_backend: str | None = None) -> ServedModel:
        """Wait until the server answers.

        Raises:
            UserError: it does not, or it can't serve: no routes for new weights, another `transfer_backend` than this,
                log-probabilities of another kind, or sequences shorter than `max_length`.
        """
        patience = Patience(self.patience)
        while True:
            try:
                return self._hello(max_length, transfer_backend)
            except ServerDown as error:
                patience.wait(error)

    def _hello(self, max_length: int, transfer_backend: str | None) -> ServedModel:
        model = self._served_model(max_length)
        missing = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
        config = self.exchange("GET", "/server_info", params={"config_format": "json"}, hint=missing)["vllm_config"]
        mode = config["model_config"]["logprobs_mode"]
        if mode != "raw_logprobs":
            raise UserError(f"{self.url}: gives {mode}; start it with --logprobs-mode raw_logprobs")
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if transfer_backend not in (None, backend):
            extension = " --worker-extension-cls megatron_gkd.rollout.vllm_worker.WorkerExtension"
            raise UserError(
                f"{self.url}: its weight-transfer backend is {backend}, not rollout.weight_sync = {transfer_backend}; "
                f'start it with --weight-transfer-config \'{{"backend": "{transfer_backend}"}}\''
                + (extension if transfer_backend == "gloo" else "")
            )
        self.exchange("GET", "/weight_info", hint="its vLLM is too old: 0.32 is known to have it")
        return model

    def _served_model(self, max_length: int) -> ServedModel:
        card = self.exchange("GET", "/v1/models")["data"][0]
        model = ServedModel(card["id"], card["max_model_len"])
        if model.max_model_len < max_length:
            raise UserError(
                f"{self.url}: serves sequences of up to {model.max_model_len} tokens, fewer than data.max_length = "
                f"{max_length}; start it with --max-model-len {max_length}"
            )
        return model

    def load(self, weights: Weights) -> None:
        """Serve these from now on. Requests in flight are aborted.

        Raises:
            UserError: the weights are not there as they were made, or the server can't load them, or is gone.
        """
        self.wanted = weights
        self._be_current(Patience(self.patience))

    def complete(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The answer to a request to /v1/completions (its first choice), and the label that it was asked under.

        Repeated until it succeeds, as it is idempotent; a server that has been restarted is given the weights again.
        """
        patience = Patience(self.patience)
        while True:
            label = self.label
            try:
                if label is not None:
                    choice = self.exchange("POST", "/v1/completions", json=request)["choices"][0]
                    if choice["finish_reason"] in ("stop", "length"):
                        return label, choice
                    raise ServerDown(f"{self.url}: ended a completion by {choice['finish_reason']!r}")
            except ServerDown as error:
                patience.wait(error)
            self._be_current(patience)

    def current_label(self) -> str:
        """Of the newest weights, which the server has afterwards if it had not."""
        return self._be_current(Patience(self.patience))

    def still_has(self, label: str) -> bool:
        """Whether what was asked under `label` was answered by those weights. Afterwards it has the newest ones."""
        try:
            if self.reported_label() == label:
                return True
        except ServerDown:
            pass
        return self.current_label() == label

    def look_after(self) -> None:
        """Give it the newest weights again if it lost them. Not a word if that fails: whoever asks it will hear."""
        with suppress(UserError):
            self._be_current(Patience(0))

    def _be_current(self, patience: Patience) -> str:
        with self.lock:
            while True:
                try:
                    label = self.reported_label()
                    if not label.startswith(self.wanted.label + "."):
                        self._hand_over(self)
                        label = self.serve_wanted()
                    self.label = label
                    return label
                except ServerDown as error:
                    patience.wait(error)

    def pause(self) -> None:
        self.exchange("POST", "/pause", params={"mode": "abort"})

    def serve_wanted(self) -> str:
        """Go on, now that the wanted weights are there. Returns the label that says so."""
        # The cache's blocks hold keys and values of the old weights.
        if not self.exchange("POST", "/reset_prefix_cache")["success"]:
            raise ServerDown(f"{self.url}: its prefix cache is in use and can't be reset")
        self.exchange("POST", "/resume")
        label = f"{self.wanted.label}.{secrets.token_hex(4)}"
        self.set_label(label)  # last, so that it is there only where all the rest has been done
        return label

    def reported_label(self) -> str:
        return self.exchange("GET", "/weight_info")["weight_version"]

    def set_label(self, label: str) -> None:
        self.exchange("POST", "/update_weight_version", json={"new_version": label})

    def is_up(self) -> bool:
        try:
            self.exchange("GET", "/health")
        except ServerDown:
            return False
        return True

    def exchange(self, method: str, path: str, *, hint: str = "", **options: Any) -> Any:
        """One request and its answer, decoded. `hint` is what to do if the server does not know `path`."""
        content = exchange(self._http, method, self.url + path, hint=hint, **options)
        return json.loads(content) if content else None

"""One vLLM server as the trainer sees it: completions by token ids, and weights that are always the student's newest.

A server that was restarted has the weights that it began with, and says nothing about it. So every loading leaves a
label of its own there (vLLM's "weight version"), and a completion counts if the server still has the label afterwards
that it had when the completion was asked for (`StudentServer.complete`, `StudentServer.current_label`).
"""

from __future__ import annotations

import json
import secrets
import threading
from dataclasses import dataclass
from typing import Any

import httpx

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm_weights import SharedWeights
from megatron_gkd.runtime import servers
from megatron_gkd.runtime.servers import ServerDown, exchange


class Patience(servers.Patience):
    key = "rollout.server_patience_s"


@dataclass(frozen=True)
class ServedModel:
    """What a server says about itself. max_model_len: tokens of prompt and completion together."""

    name: str
    max_model_len: int


class StudentServer:
    """`http` may be shared between servers and threads. `patience` is in seconds, for each task."""

    def __init__(self, url: str, http: httpx.Client, patience: float):
        self.url, self.patience = url.rstrip("/"), patience
        self._http = http
        self._lock = threading.Lock()  # of whoever looks after the server's weights
        self._wanted: SharedWeights | None = None
        self._label: str | None = None

    def hello(self, max_length: int) -> ServedModel:
        """Wait until the server answers.

        Raises:
            UserError: it does not, or it can't serve: no routes for new weights, log-probabilities of another kind,
                or sequences shorter than `max_length`.
        """
        patience = Patience(self.patience)
        while True:
            try:
                return self._hello(max_length)
            except ServerDown as error:
                patience.wait(error)

    def _hello(self, max_length: int) -> ServedModel:
        card = self._exchange("GET", "/v1/models")["data"][0]
        model = ServedModel(card["id"], card["max_model_len"])
        if model.max_model_len < max_length:
            raise UserError(
                f"{self.url}: serves sequences of up to {model.max_model_len} tokens, fewer than data.max_length = "
                f"{max_length}; start it with --max-model-len {max_length}"
            )
        missing = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
        config = self._exchange("GET", "/server_info", params={"config_format": "json"}, hint=missing)
        mode = config["vllm_config"]["model_config"]["logprobs_mode"]
        if mode != "raw_logprobs":
            raise UserError(f"{self.url}: gives {mode}; start it with --logprobs-mode raw_logprobs")
        self._exchange("GET", "/weight_info", hint="its vLLM is too old: 0.32 is known to have it")
        return model

    def load(self, weights: SharedWeights) -> None:
        """Serve these from now on. Requests in flight are aborted.

        Raises:
            UserError: the weights are not on disk as they were written, or the server can't load them, or is gone.
        """
        self.want(weights)
        self._be_current(Patience(self.patience))

    def want(self, weights: SharedWeights) -> None:
        """From now on these count, whoever has the server load them."""
        self._wanted = weights

    def complete(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The answer to a request to /v1/completions (its first choice), and the label that it was asked under.

        Repeated until it succeeds, as it is idempotent; a server that has been restarted is given the weights again.
        """
        patience = Patience(self.patience)
        while True:
            label = self._label
            try:
                if label is not None:
                    choice = self._exchange("POST", "/v1/completions", json=request)["choices"][0]
                    if choice["finish_reason"] in ("stop", "length"):
                        return label, choice
                    raise ServerDown(f"{self.url}: ended a completion by {choice['finish_reason']!r}")
            except ServerDown as error:
                patience.wait(error)
            self._be_current(patience)

    def current_label(self) -> str:
        """Of the newest weights, which the server has afterwards if it had not."""
        return self._be_current(Patience(self.patience))

    def _be_current(self, patience: Patience) -> str:
        with self._lock:
            while True:
                try:
                    label = self._exchange("GET", "/weight_info")["weight_version"]
                    if not label.startswith(self._wanted.label + "."):
                        label = self._load()
                    self._label = label
                    return label
                except ServerDown as error:
                    patience.wait(error)

    def _load(self) -> str:
        weights = self._wanted
        weights.validate()
        label = f"{weights.label}.{secrets.token_hex(4)}"
        self._exchange("POST", "/pause", params={"mode": "abort"})
        self._reload(weights)
        # Its blocks hold keys and values of the old weights.
        if not self._exchange("POST", "/reset_prefix_cache")["success"]:
            raise ServerDown(f"{self.url}: its prefix cache is in use and can't be reset")
        self._exchange("POST", "/resume")
        # Last, so that it is there only where all the rest has been done.
        self._exchange("POST", "/update_weight_version", json={"new_version": label})
        return label

    def _reload(self, weights: SharedWeights) -> None:
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(weights.directory)}}
        try:
            self._exchange("POST", "/collective_rpc", json=call)
        except ServerDown as error:
            try:
                self._exchange("GET", "/health")
            except ServerDown:
                raise error from None  # it went down, for this reason or another; its successor gets its chance
            raise UserError(
                f"{self.url}: can't load {weights.directory} and needs a restart. Does it see this folder under this "
                f"path (rollout.weight_sync_dir), and does it serve the student's architecture? It says: {error}"
            ) from error

    def _exchange(self, method: str, path: str, *, hint: str = "", **options: Any) -> Any:
        """One request and its answer, decoded. `hint` is what to do if the server does not know `path`."""
        content = exchange(self._http, method, self.url + path, hint=hint, **options)
        return json.loads(content) if content else None

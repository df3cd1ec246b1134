"""One vLLM server as the trainer sees it: completions by token ids, and weights that are always the student's newest.

A server that was restarted has the weights that it began with, and says nothing about it. So every loading leaves a
label of its own there (vLLM's "weight version"), and a completion counts if the server still has the label afterwards
that it had when the completion was asked for (`StudentServer.complete`, `StudentServer.current_label`).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec

from megatron_gkd.errors import GkdError, UserError
from megatron_gkd.runtime import servers
from megatron_gkd.runtime.servers import ServedModel, Server, ServerDown

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_ROUNDING = 1e-3  # nats by which a log-probability may be above 0


class Patience(servers.Backoff):
    key = "rollout.vllm_server_max_downtime_s"


@dataclass(frozen=True)
class Weights:
    """One version of the student's weights. `version` is as given to `RolloutEngine.load_weights`; `label` names run
    and version to a server.
    """

    version: int
    label: str


@dataclass(frozen=True)
class ServerNeeds:
    """What a server must be able to do.

    Attributes:
        max_length: tokens of the longest sequence.
        transfer_backend: of vLLM's weight transfer; None: it is not used.
        lora_rank: highest rank of the adapters that it is given at run time; None: it gets whole weights.
        needs_fp32: it must compute in fp32.
    """

    max_length: int
    transfer_backend: str | None = None
    lora_rank: int | None = None
    needs_fp32: bool = False


@dataclass(frozen=True)
class StudentRequirements:
    """What a server must still be after a restart: the argument of `StudentServer.hello`, and what that returned."""

    needs: ServerNeeds
    model: ServedModel


@dataclass(frozen=True)
class Sampled:
    """What a server sampled for one request: ids, the log-probability of each in nats, and "stop" or "length"."""

    token_ids: list[int]
    log_probs: list[float]
    finish_reason: str


class _ModelConfig(msgspec.Struct):
    logprobs_mode: str
    dtype: str | None = None


class _TransferConfig(msgspec.Struct):
    backend: str | None = None


class _LoraConfig(msgspec.Struct):
    max_lora_rank: int


class _Config(msgspec.Struct):
    model_config: _ModelConfig
    weight_transfer_config: _TransferConfig | None = None
    lora_config: _LoraConfig | None = None


class _ServerInfo(msgspec.Struct):
    vllm_config: _Config


class _WeightInfo(msgspec.Struct):
    weight_version: str


class _Reset(msgspec.Struct):
    success: bool


class _LogProbs(msgspec.Struct):
    token_logprobs: list[float | None]


class _Choice(msgspec.Struct):
    finish_reason: str
    token_ids: list[int] | None = None
    logprobs: _LogProbs | None = None


class _Completion(msgspec.Struct):
    choices: Annotated[list[_Choice], msgspec.Meta(min_length=1)]


_COMPLETION = msgspec.json.Decoder(_Completion)


class StudentServer(Server):
    """`http` may be shared between servers and threads. `patience` is in seconds, for each task.

    `hand_over(server)` pauses the server and gives it the weights that are `wanted`. It raises ServerDown if that does
    not work now, and UserError if it never will.
    """

    def __init__(self, url: str, http: httpx.Client, patience: float, hand_over: Callable[[StudentServer], None]):
        super().__init__(url, http)
        self.patience = patience
        self.wanted: Weights | None = None
        self.label: str | None = None
        """What the server said when it was last seen to have the wanted weights."""
        self.lock = threading.Lock()
        """Of whoever looks after the server's weights."""
        self.requirements: StudentRequirements | None = None
        """What the server is held to each time that it has lost its weights, as it may have been started anew."""
        self._hand_over = hand_over

    def hello(self, needs: ServerNeeds) -> ServedModel:
        """Wait until the server answers.

        Raises:
            UserError: it does not, or it can't serve: no routes for new weights, log-probabilities of another kind, or
                less than `needs`.
        """
        patience = Patience(self.patience)
        while True:
            try:
                return self._hello(needs)
            except ServerDown as error:
                patience.wait(error)

    def _hello(self, needs: ServerNeeds) -> ServedModel:
        model = self._served_model(needs.max_length)
        missing = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
        parameters = {"config_format": "json"}
        config = self.request("GET", "/server_info", _ServerInfo, params=parameters, hint=missing).vllm_config
        mode = config.model_config.logprobs_mode
        if mode != "raw_logprobs":
            raise UserError(f"{self.url}: gives {mode}; start it with --logprobs-mode raw_logprobs")
        for problem in _problems(config, needs):
            raise UserError(f"{self.url}: {problem}")
        self.request("GET", "/weight_info", _WeightInfo, hint="its vLLM is too old: 0.32 is known to have it")
        return model

    def _served_model(self, max_length: int) -> ServedModel:
        model = self.served_model()
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

    def complete(self, request: dict[str, Any]) -> tuple[str, Sampled]:
        """Send a request to /v1/completions. Returns the label that it was sent under, and what the server sampled.

        Repeated until it succeeds, as it is idempotent; a server that has been restarted is given the weights again.
        """
        patience = Patience(self.patience)
        while True:
            label = self.label
            try:
                if label is not None:
                    return label, self._sample(request)
            except ServerDown as error:
                patience.wait(error)
            self._be_current(patience)

    def _sample(self, request: dict[str, Any]) -> Sampled:
        path = "/v1/completions"
        try:
            choice = self.request("POST", path, _COMPLETION, json=request).choices[0]
        except servers.RouteMissing as error:  # vLLM's answer, too, where it has no model of this name
            needs = self.requirements
            if needs is None or needs.needs.lora_rank is None:
                raise
            raise ServerDown(str(error)) from error  # it was started anew, and has to be given the adapters
        if choice.finish_reason not in ("stop", "length"):
            raise ServerDown(f"{self.url}: ended a completion by {choice.finish_reason!r}")
        ids, log_probs = choice.token_ids, choice.logprobs.token_logprobs if choice.logprobs else None
        problem = None
        if not ids:
            problem = f"its token_ids are {ids}; expected are the ids of the completion (return_token_ids)"
        elif min(ids) < 0:
            problem = f"its token_ids hold {min(ids)}; expected are ids from 0"
        elif len(ids) > request["max_tokens"]:
            problem = f"it has {len(ids)} tokens; expected are at most max_tokens = {request['max_tokens']}"
        elif log_probs is None or len(log_probs) != len(ids):
            found = "no" if log_probs is None else len(log_probs)
            problem = f"it has {found} token_logprobs; expected are {len(ids)}, one for each of its token_ids"
        elif not all(value is not None and value <= _ROUNDING for value in log_probs):
            problem = (
                "its token_logprobs are not all numbers up to 0; start the server with --logprobs-mode raw_logprobs"
            )
        if problem is not None:
            raise UserError(f"{self.url}{path}: {problem}")
        return Sampled(ids, log_probs, choice.finish_reason)

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
        with suppress(GkdError):
            self._be_current(Patience(0))

    def _be_current(self, patience: Patience) -> str:
        with self.lock:
            while True:
                try:
                    label = self.reported_label()
                    if not label.startswith(self.wanted.label + "."):
                        self._require_unchanged(label)
                        self._hand_over(self)
                        label = self.serve_wanted()
                    self.label = label
                    return label
                except ServerDown as error:
                    patience.wait(error)

    def _require_unchanged(self, label: str) -> None:
        """Repeat the handshake with a server that had this run's weights and has a label of another origin now.

        It has been started anew, perhaps with other options or another model.
        """
        required, run = self.requirements, self.wanted.label.rpartition("-")[0]
        if required is None or self.label is None or label.startswith(f"{run}-"):
            return
        model = self._hello(required.needs)
        if model.name != required.model.name:
            raise UserError(
                f"{self.url}: serves {model.name} since it lost the student's weights, and served "
                f"{required.model.name} before; start it again as it was (--served-model-name {required.model.name})"
            )

    def pause(self) -> None:
        self.command("/pause", params={"mode": "abort"})

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load the PEFT adapters in `folder`, which requests name `name` from then on."""
        hint = "start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        body = {"lora_name": name, "lora_path": str(folder)}
        servers.exchange(self._http, "POST", f"{self.url}/v1/load_lora_adapter", hint=hint, json=body)

    def unload_adapter(self, name: str) -> None:
        """Forget adapters, if the server still has them."""
        with suppress(servers.RouteMissing):
            servers.exchange(self._http, "POST", f"{self.url}/v1/unload_lora_adapter", json={"lora_name": name})

    def serve_wanted(self) -> str:
        """Go on, now that the wanted weights are there. Returns the label that says so."""
        # The cache's blocks hold keys and values of the old weights.
        if not self.request("POST", "/reset_prefix_cache", _Reset).success:
            raise ServerDown(f"{self.url}: its prefix cache is in use and can't be reset")
        self.command("/resume")
        label = f"{self.wanted.label}.{secrets.token_hex(4)}"
        self.set_label(label)  # last, so that it is there only where all the rest has been done
        return label

    def reported_label(self) -> str:
        return self.request("GET", "/weight_info", _WeightInfo).weight_version

    def set_label(self, label: str) -> None:
        self.command("/update_weight_version", json={"new_version": label})

    def is_up(self) -> bool:
        try:
            servers.exchange(self._http, "GET", f"{self.url}/health")
        except ServerDown:
            return False
        return True


def _problems(config: _Config, needs: ServerNeeds) -> Iterator[str]:
    backend = config.weight_transfer_config.backend if config.weight_transfer_config else None
    if needs.transfer_backend not in (None, backend):
        extension = " --worker-extension-cls megatron_gkd.rollout.vllm_worker.WorkerExtension"
        yield (
            f"its weight-transfer backend is {backend}, not rollout.weight_sync = {needs.transfer_backend}; "
            f'start it with --weight-transfer-config \'{{"backend": "{needs.transfer_backend}"}}\''
            + (extension if needs.transfer_backend == "gloo" else "")
        )
    if needs.lora_rank is not None:
        most = config.lora_config.max_lora_rank if config.lora_config else 0
        if most < needs.lora_rank:
            yield (
                f"takes adapters of rank {most} at most, which has to be {needs.lora_rank}; with rollout.weight_sync = "
                f"lora start it with --enable-lora --max-lora-rank {_max_lora_rank(needs.lora_rank)}, and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            )
    if needs.needs_fp32 and config.model_config.dtype != "torch.float32":
        yield f"computes in {config.model_config.dtype}; with lora.merge_dtype = fp32 start it with --dtype float32"


def _max_lora_rank(rank: int) -> int:
    """Return the lowest value of vLLM's --max-lora-rank that takes adapters of `rank`."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= rank), rank)

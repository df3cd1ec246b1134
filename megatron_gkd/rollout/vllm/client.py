"""Client of one rollout server: completions by token ids, from weights that are always the student's newest.

A server that was restarted has the weights that it started with, and does not report it. So every loading sets a label
of its own there (vLLM's "weight version"), and a completion counts if the server still has the label afterwards that it
had when the completion was requested (`StudentServer.complete`, `StudentServer.still_has`).
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import msgspec

from megatron_gkd.errors import GkdError, UserError
from megatron_gkd.rollout.vllm.completion_response import (
    COMPLETION_DECODER,
    FINISH_REASONS,
    GENERATION_DECODER,
    CompletionResponse,
    GenerationResponse,
    Sampled,
    read_choice,
)
from megatron_gkd.rollout.vllm.handshake import Handshake, ServerInfo, ServerRequirements, find_problems
from megatron_gkd.rollout.vllm.prompt import require_same_tokens
from megatron_gkd.rollout.vllm.requests import COMPLETIONS, GENERATE_HINT, CompletionRequest
from megatron_gkd.runtime import servers
from megatron_gkd.runtime.servers import Backoff, ServedModel, Server, ServerDown


class RolloutBackoff(Backoff):
    """Pauses between the attempts at one task with a rollout server."""

    key = "rollout.vllm_server_max_downtime_s"


@dataclass(frozen=True)
class Weights:
    """One version of the student's weights.

    Attributes:
        version: as given to `RolloutEngine.load_weights`.
        label: names the run and the version to a server.
    """

    version: int
    label: str


class _WeightInfo(msgspec.Struct):
    weight_version: str


class _Reset(msgspec.Struct):
    success: bool


class StudentServer(Server):
    """A server that samples from the student.

    Args:
        url: of the server's root.
        http: may be shared between servers and threads.
        max_downtime: seconds for which one task may fail.
        send_weights: pauses the server and loads the weights that are `wanted`. Raises ServerDown if that does not work
            now, and GkdError if it never will.

    Attributes:
        wanted: the weights that the server is to have.
        label: what the server reported when it last had the wanted weights; None before.
        lock: of the thread that loads weights.
        handshake: repeated each time that the server has lost its weights, as it may have been restarted.
    """

    api_key_env = "rollout.vllm_server_api_key_env"

    def __init__(
        self, url: str, http: httpx.Client, max_downtime: float, send_weights: Callable[[StudentServer], None]
    ) -> None:
        super().__init__(url, http)
        self.max_downtime = max_downtime
        self.wanted: Weights | None = None
        self.label: str | None = None
        self.lock = threading.Lock()
        self.handshake: Handshake | None = None
        self._send_weights = send_weights

    def wait_until_ready(self, requirements: ServerRequirements) -> ServedModel:
        """Wait until the server responds, check it, and return the model that it serves.

        Raises:
            ServiceError: it does not respond.
            UserError: it can not serve: it has no routes for new weights, returns log-probabilities of another kind, or
                does not meet the requirements.
        """
        backoff = RolloutBackoff(self.max_downtime)
        while True:
            try:
                return self._check(requirements)
            except ServerDown as error:
                backoff.wait(error)

    def _check(self, requirements: ServerRequirements) -> ServedModel:
        model = self._check_model(requirements.max_length)
        hint = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"
        parameters = {"config_format": "json"}
        config = self.request("GET", "/server_info", ServerInfo, params=parameters, hint=hint).vllm_config
        for problem in find_problems(config, requirements):
            raise UserError(f"{self.url}: {problem}")
        self.request("GET", "/weight_info", _WeightInfo, hint="its vLLM is too old: 0.32 is known to have it")
        return model

    def _check_model(self, max_length: int) -> ServedModel:
        model = self.served_model()
        if model.max_model_len < max_length:
            raise UserError(
                f"{self.url}: serves sequences of up to {model.max_model_len} tokens, fewer than data.max_length = "
                f"{max_length}; start it with --max-model-len {max_length}"
            )
        return model

    def load(self, weights: Weights) -> None:
        """Serve these weights from now on. Requests in flight are aborted.

        Raises:
            UserError: the weights are not there as they were made.
            ServiceError: the server can't load them, or is gone.
        """
        self.wanted = weights
        self.ensure_current()

    def complete(self, request: CompletionRequest) -> tuple[str, Sampled]:
        """Let the server complete a prompt.

        The request is repeated until it succeeds, as it is idempotent; a server that has been restarted gets the
        weights again.

        Returns:
            The server's label when the request was sent, and what the server sampled.

        Raises:
            UserError: the server refuses the request, or makes other tokens of the prompt's images.
            ServiceError: it is gone for too long.
        """
        backoff = RolloutBackoff(self.max_downtime)
        while True:
            label = self.label
            try:
                if label is not None:
                    return label, self._sample(request)
            except ServerDown as error:
                backoff.wait(error)
            self._ensure_current(backoff)

    def _sample(self, request: CompletionRequest) -> Sampled:
        try:
            response = self._respond(request)
        except servers.RouteMissing as error:  # vLLM's response, too, if it has no model of this name
            if self.handshake is None or self.handshake.requirements.lora_rank is None:
                raise
            raise ServerDown(str(error)) from error  # it was restarted, and has to load the adapters again
        choice = response.first
        reason = FINISH_REASONS.get(choice.finish_reason)
        if reason is None:
            raise ServerDown(f"{self.url}: ended a completion by {choice.finish_reason!r}")
        if request.prompt is not None:
            require_same_tokens(request.prompt, response.prompt_token_ids, request.processing, self.url)
        try:
            return read_choice(choice, reason, request.max_tokens)
        except ValueError as error:
            raise UserError(f"{self.url}{request.path}: {error}") from error

    def _respond(self, request: CompletionRequest) -> CompletionResponse | GenerationResponse:
        if request.path == COMPLETIONS:
            return self.request("POST", request.path, COMPLETION_DECODER, json=request.body)
        return self.request("POST", request.path, GENERATION_DECODER, hint=GENERATE_HINT, json=request.body)

    def ensure_current(self) -> str:
        """Load the newest weights unless the server has them, and return its label."""
        return self._ensure_current(RolloutBackoff(self.max_downtime))

    def still_has(self, label: str) -> bool:
        """Return whether the server has had the weights of `label` all the time. Afterwards it has the newest ones."""
        try:
            if self.reported_label() == label:
                return True
        except ServerDown:
            pass
        return self.ensure_current() == label

    def try_to_restore(self) -> None:
        """Load the newest weights again if the server has lost them, in one attempt; requests report a failure."""
        with suppress(GkdError):
            self._ensure_current(RolloutBackoff(0))

    def _ensure_current(self, backoff: Backoff) -> str:
        with self.lock:
            while True:
                try:
                    label = self.reported_label()
                    if not label.startswith(self.wanted_weights.label + "."):
                        self._check_after_restart(label)
                        self._send_weights(self)
                        label = self.resume()
                    self.label = label
                    return label
                except ServerDown as error:
                    backoff.wait(error)

    @property
    def wanted_weights(self) -> Weights:
        """The weights that the server is to have, which must be set."""
        if self.wanted is None:
            raise RuntimeError(f"{self.url}: load_weights must be called before the server samples")
        return self.wanted

    def _check_after_restart(self, label: str) -> None:
        """Repeat the handshake if the server had this run's weights and has a label of another origin now.

        It has been restarted, perhaps with other options or another model.
        """
        handshake, run = self.handshake, self.wanted_weights.label.rpartition("-")[0]
        if handshake is None or self.label is None or label.startswith(f"{run}-"):
            return
        model = self._check(handshake.requirements)
        if model.name != handshake.model.name:
            raise UserError(
                f"{self.url}: serves {model.name} since it lost the student's weights, and served "
                f"{handshake.model.name} before; start it again as it was "
                f"(--served-model-name {handshake.model.name})"
            )

    def pause(self) -> None:
        """Abort the requests in flight, and let new ones wait until `resume`."""
        self.command("/pause", params={"mode": "abort"})

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load the PEFT adapters in `folder`, which requests name `name` from then on."""
        hint = "start it with --enable-lora, and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        body = {"lora_name": name, "lora_path": str(folder)}
        self.exchange("POST", "/v1/load_lora_adapter", hint=hint, json=body)

    def unload_adapter(self, name: str) -> None:
        """Unload adapters, if the server still has them."""
        with suppress(servers.RouteMissing):
            self.exchange("POST", "/v1/unload_lora_adapter", json={"lora_name": name})

    def resume(self) -> str:
        """Go on with the wanted weights, which must be loaded. Returns the label that is set for them."""
        # The cache's blocks hold keys and values of the old weights.
        if not self.request("POST", "/reset_prefix_cache", _Reset).success:
            raise ServerDown(f"{self.url}: its prefix cache is in use and can't be reset")
        self.command("/resume")
        label = f"{self.wanted_weights.label}.{secrets.token_hex(4)}"
        self.set_label(label)  # last, so that it is there only if all the rest has succeeded
        return label

    def reported_label(self) -> str:
        """Return the label that the server has now."""
        return self.request("GET", "/weight_info", _WeightInfo).weight_version

    def set_label(self, label: str) -> None:
        """Set the server's label."""
        self.command("/update_weight_version", json={"new_version": label})

    def is_up(self) -> bool:
        """Return whether the server responds now."""
        try:
            self.exchange("GET", "/health")
        except ServerDown:
            return False
        return True

"""Sample from vLLM servers with the weights that they were started with; they need no routes for new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from megatron_gkd.rollout.vllm.client import StudentServer
from megatron_gkd.rollout.vllm.handshake import ServerRequirements
from megatron_gkd.rollout.vllm.server import VllmServerEngine
from megatron_gkd.runtime.servers import Backoff, ServedModel

_LABEL = "as it was started"


class FixedWeightsServer(StudentServer):
    """A server of a teacher, whose weights never change."""

    api_key_env = "teacher.teacher_server_api_key_env"

    def _check(self, requirements: ServerRequirements) -> ServedModel:
        model = self._check_model(requirements.max_length)
        self.require_running()
        return model

    def _ensure_current(self, backoff: Backoff) -> str:
        self.label = _LABEL
        return _LABEL

    def reported_label(self) -> str:
        """Return the one label that there is."""
        return _LABEL


class OwnWeightsEngine(VllmServerEngine):
    """A rollout engine whose weights never change. `checkpoint` has the ids and the EOS that are used with it."""

    server_kind = FixedWeightsServer

    def _build_sync(self) -> None:
        return None

    def _build_sender(self) -> Callable[[StudentServer], None]:
        return lambda server: None  # there is nothing to send

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Leave `named_tensors` alone, on every rank."""

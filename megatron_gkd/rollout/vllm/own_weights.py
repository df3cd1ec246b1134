"""vLLM servers as they were started: they answer with their own weights, and need no route for new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from megatron_gkd.rollout.vllm.client import Patience, ServerNeeds, StudentServer
from megatron_gkd.rollout.vllm.server import VllmServerEngine
from megatron_gkd.runtime.servers import ServedModel

_LABEL = "as it was started"


class ServerAsStarted(StudentServer):
    """One of them."""

    def _hello(self, needs: ServerNeeds) -> ServedModel:
        model = self._served_model(needs.max_length)
        self.require_running()
        return model

    def _be_current(self, patience: Patience) -> str:
        self.label = _LABEL
        return _LABEL

    def reported_label(self) -> str:
        return _LABEL


class OwnWeightsEngine(VllmServerEngine):
    """A rollout engine whose weights never change. `checkpoint` names the ids and the EOS that are used with it."""

    server_kind = ServerAsStarted

    def _build_sync(self) -> None:
        return None

    def _hand_over(self) -> Callable[[StudentServer], None]:
        return lambda server: None  # there is nothing to give

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Leaves `named_tensors` alone, on every rank."""

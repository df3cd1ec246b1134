"""How vLLM servers are used for rollouts, and what they must be able to do for that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_gkd.config.api_keys import NO_API_KEY, ApiKeyVariable
from megatron_gkd.rollout.vllm.handshake import ServerRequirements
from megatron_gkd.rollout.vllm.weight_folder import Shapes


@dataclass(frozen=True)
class ServedAdapters:
    """The adapters that servers load.

    Attributes:
        config: adapter_config.json.
        shapes: of the factors by PEFT's names.
    """

    config: Mapping[str, Any]
    shapes: Shapes

    @property
    def rank(self) -> int:
        """The highest rank of a layer."""
        return max([int(self.config["r"]), *self.config["rank_pattern"].values()])


@dataclass(frozen=True)
class RolloutServerOptions:
    """The servers, and how they are used.

    Attributes:
        urls: of the servers' roots; prompts are dealt to them in turn.
        weight_sync_dir: the folder for weights; the servers see it under the same path.
        max_length: tokens of a prompt and its completion together.
        weight_sync: how they get weights: through that folder, sent over nccl or gloo, or adapters alone ("lora"),
            through that folder as well.
        adapters: what "lora" sends; None with others.
        needs_fp32: whether they must compute in fp32.
        concurrency: requests of one replica at the same time, over all servers.
        timeout: seconds that one response may take.
        max_downtime: seconds for which a server may fail before the run stops.
        api_key: the variable with the servers' API key.
    """

    urls: tuple[str, ...]
    weight_sync_dir: Path
    max_length: int
    weight_sync: Literal["folder", "nccl", "gloo", "lora"] = "folder"
    adapters: ServedAdapters | None = None
    needs_fp32: bool = False
    concurrency: int = 64
    timeout: float = 600.0
    max_downtime: float = 300.0
    api_key: ApiKeyVariable = NO_API_KEY

    @property
    def transfer_backend(self) -> Literal["nccl", "gloo"] | None:
        """The backend that weights are sent over; None if they go through the folder."""
        return self.weight_sync if self.weight_sync in ("nccl", "gloo") else None

    def requirements(self) -> ServerRequirements:
        """Return what each server must be able to do."""
        rank = None if self.adapters is None else self.adapters.rank
        return ServerRequirements(self.max_length, self.transfer_backend, rank, self.needs_fp32)

"""What a rollout server must be able to do, and what is checked of it before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from megatron_gkd.runtime.servers import ServedModel

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ServerRequirements:
    """What a server must be able to do.

    Attributes:
        max_length: tokens of the longest sequence.
        transfer_backend: of vLLM's weight transfer; None: it is not used.
        lora_rank: highest rank of the adapters that the server loads at run time; None: it gets whole weights.
        needs_fp32: whether it must compute in fp32.
    """

    max_length: int
    transfer_backend: str | None = None
    lora_rank: int | None = None
    needs_fp32: bool = False


@dataclass(frozen=True)
class Handshake:
    """A handshake with a server, which must have the same result after a restart of the server."""

    requirements: ServerRequirements
    model: ServedModel


class _ModelConfig(msgspec.Struct):
    logprobs_mode: str
    dtype: str | None = None


class _TransferConfig(msgspec.Struct):
    backend: str | None = None


class _LoraConfig(msgspec.Struct):
    max_lora_rank: int


class ServerConfig(msgspec.Struct):
    """vLLM's configuration, as far as it matters here."""

    model_config: _ModelConfig
    weight_transfer_config: _TransferConfig | None = None
    lora_config: _LoraConfig | None = None


class ServerInfo(msgspec.Struct):
    """The response of /server_info."""

    vllm_config: ServerConfig


def find_problems(config: ServerConfig, requirements: ServerRequirements) -> Iterator[str]:
    """Yield what of a server's configuration does not meet the requirements, and which options do."""
    mode = config.model_config.logprobs_mode
    if mode != "raw_logprobs":
        yield f"gives {mode}; start it with --logprobs-mode raw_logprobs"
    backend = config.weight_transfer_config.backend if config.weight_transfer_config else None
    required = requirements.transfer_backend
    if required not in (None, backend):
        extension = " --worker-extension-cls megatron_gkd.rollout.vllm_worker.WorkerExtension"
        yield (
            f"its weight-transfer backend is {backend}, not rollout.weight_sync = {required}; "
            f'start it with --weight-transfer-config \'{{"backend": "{required}"}}\''
            + (extension if required == "gloo" else "")
        )
    rank = requirements.lora_rank
    max_rank = config.lora_config.max_lora_rank if config.lora_config else 0
    if rank is not None and max_rank < rank:
        yield (
            f"takes adapters of rank {max_rank} at most, which has to be {rank}; with rollout.weight_sync = "
            f"lora start it with --enable-lora --max-lora-rank {_max_lora_rank(rank)}, and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
        )
    if requirements.needs_fp32 and config.model_config.dtype != "torch.float32":
        yield f"computes in {config.model_config.dtype}; with lora.merge_dtype = fp32 start it with --dtype float32"


def _max_lora_rank(rank: int) -> int:
    """Return the lowest value of vLLM's --max-lora-rank that takes adapters of `rank`."""
    return next((allowed for allowed in _VLLM_RANKS if allowed >= rank), rank)

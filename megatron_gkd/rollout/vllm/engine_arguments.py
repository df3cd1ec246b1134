"""How vLLM runs in the training processes, as arguments of its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.config.schema import RolloutSection
from megatron_gkd.data.vision.processing import ImageProcessing
from megatron_gkd.data.vision.vllm_settings import processor_options


@dataclass(frozen=True)
class ColocatedOptions:
    """How vLLM runs in the training processes.

    Attributes:
        dtype: of its weights and activations.
        max_model_len: tokens of a prompt and its completion together.
        tensor_parallel_size: consecutive ranks that share an engine.
        gpu_memory_utilization: share of a device's whole memory for its weights, activations and cache.
        kv_cache_memory_bytes: of the cache of keys and values on each rank, instead of what that share leaves.
        sleep_level: what it frees between rollouts: 0 nothing; 1 the cache, with the weights in host memory; 2 both.
        enforce_eager: no CUDA graphs and no compilation. On CPUs always.
        further: other arguments of vLLM's engine, by their names there.
    """

    dtype: torch.dtype
    max_model_len: int
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.3
    kv_cache_memory_bytes: int | None = None
    sleep_level: int = 2
    enforce_eager: bool = False
    further: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_section(cls, section: RolloutSection, dtype: torch.dtype, max_length: int) -> ColocatedOptions:
        """Read the recipe's section `rollout`.

        Args:
            section: the section.
            dtype: of vLLM's weights.
            max_length: tokens of a prompt and its completion together, where the section does not name them.
        """
        cache = section.vllm_kv_cache_gib
        named = {
            "max_num_seqs": section.vllm_max_num_seqs,
            "enable_prefix_caching": section.vllm_enable_prefix_caching,
            "enable_expert_parallel": section.vllm_enable_expert_parallel or None,
            "quantization": section.vllm_quantization,
            "limit_mm_per_prompt": section.vllm_limit_mm_per_prompt,
        }
        return cls(
            dtype=dtype,
            max_model_len=section.vllm_max_model_len or max_length,
            tensor_parallel_size=section.vllm_tensor_parallel_size,
            gpu_memory_utilization=section.vllm_gpu_memory_utilization,
            kv_cache_memory_bytes=None if cache is None else int(cache * 2**30),
            sleep_level=section.sleep_level,
            enforce_eager=section.enforce_eager,
            further={name: value for name, value in named.items() if value is not None} | section.vllm_engine_kwargs,
        )


def engine_arguments(
    path: Path, options: ColocatedOptions, images: ImageProcessing | None, *, on_host: bool
) -> dict[str, Any]:
    """Return the arguments of vLLM's engine.

    Args:
        path: of the checkpoint whose architecture it has.
        options: how it runs; its further arguments replace none of the others.
        images: what the model's processor makes of images; None for a text model.
        on_host: whether it runs on CPUs.
    """
    own = {
        "model": str(path),
        "generation_config": "vllm",  # nothing from the model's generation_config.json
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "logprobs_mode": "raw_logprobs",
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        "enable_sleep_mode": options.sleep_level > 0 and not on_host,
        "enforce_eager": options.enforce_eager or on_host,
        "seed": 0,  # the same on all ranks of an engine; every request has its own
    }
    return dict(options.further) | own | _image_arguments(images)


def _image_arguments(images: ImageProcessing | None) -> dict[str, Any]:
    """Return those of vLLM's arguments that depend on whether the model reads images."""
    if images is None:
        return {"load_format": "dummy"}  # the student's weights come before the first sample
    return {
        # Dummy weights replace buffers, too, which the student's weights do not restore: mean and standard deviation of
        # pixels (vLLM 0.32, `FusedMMInputNorm`).
        "load_format": "auto",
        "mm_processor_kwargs": processor_options(images) or None,
        "mm_processor_cache_gb": 0,  # every rank would keep 4 GB of pixels, which seldom come again
    }

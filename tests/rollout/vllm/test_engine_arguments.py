"""The arguments that vLLM's engine is started with in the training processes; without vLLM."""

from __future__ import annotations

from pathlib import Path

import torch

from megatron_gkd.config.schema import RolloutSection
from megatron_gkd.rollout.vllm.engine_arguments import ColocatedOptions, engine_arguments

OWN = {
    "model": "student",
    "generation_config": "vllm",
    "dtype": torch.bfloat16,
    "max_model_len": 512,
    "logprobs_mode": "raw_logprobs",
    "distributed_executor_backend": "external_launcher",
    "tensor_parallel_size": 1,
    "gpu_memory_utilization": 0.3,
    "kv_cache_memory_bytes": None,
    "enable_sleep_mode": True,
    "enforce_eager": False,
    "seed": 0,
    "load_format": "dummy",
}


def arguments_of(on_host: bool = False, **keys) -> dict:
    options = ColocatedOptions.from_section(RolloutSection(engine="vllm", **keys), torch.bfloat16, 512)
    return engine_arguments(Path("student"), options, None, on_host=on_host)


def test_what_the_recipe_does_not_name_is_left_to_vllm():
    assert arguments_of() == OWN


def test_each_key_is_an_argument():
    keys = {
        "vllm_max_num_seqs": 8,
        "vllm_enable_prefix_caching": False,
        "vllm_enable_expert_parallel": True,
        "vllm_quantization": "fp8",
        "vllm_limit_mm_per_prompt": {"image": 2},
        "vllm_kv_cache_gib": 0.5,
        "vllm_max_model_len": 300,
        "vllm_tensor_parallel_size": 2,
        "vllm_gpu_memory_utilization": 0.4,
        "sleep_level": 0,
        "enforce_eager": True,
        "vllm_engine_kwargs": {"max_num_batched_tokens": 2048, "attention_backend": "FLASH_ATTN"},
    }
    assert arguments_of(**keys) == OWN | {
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "enable_expert_parallel": True,
        "quantization": "fp8",
        "limit_mm_per_prompt": {"image": 2},
        "kv_cache_memory_bytes": 2**29,
        "max_model_len": 300,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.4,
        "enable_sleep_mode": False,
        "enforce_eager": True,
        "max_num_batched_tokens": 2048,
        "attention_backend": "FLASH_ATTN",
    }


def test_on_cpus_vllm_is_eager_and_does_not_sleep():
    assert arguments_of(on_host=True) == OWN | {"enable_sleep_mode": False, "enforce_eager": True}


def test_further_arguments_replace_none_of_the_trainers():
    assert arguments_of(vllm_engine_kwargs={"seed": 7, "logprobs_mode": "processed_logprobs"}) == OWN

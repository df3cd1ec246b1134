"""The arguments of vLLM's engine that `rollout.vllm_engine_kwargs` may set, and the methods of `vllm_quantization`.

The names are read from the source text of the installed release: importing it would import torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

QUANTIZATIONS = (
    "fp8",
    "fp8_per_tensor",
    "fp8_per_block",
    "fp8_per_channel",
    "mxfp8",
    "int8_per_channel_weight_only",
)
"""vLLM's methods that quantize 16-bit weights as they arrive, also later ones. Others need a quantized checkpoint."""

_SOURCE = "engine/arg_utils.py"
_TOKEN = "hf_token"

_BY_RECIPE_KEY = {
    "train.dtype (or lora.merge_dtype)": ("dtype",),
    "rollout.vllm_tensor_parallel_size": ("tensor_parallel_size",),
    "rollout.vllm_gpu_memory_utilization": ("gpu_memory_utilization",),
    "rollout.vllm_kv_cache_gib": ("kv_cache_memory_bytes",),
    "rollout.vllm_max_model_len": ("max_model_len",),
    "rollout.enforce_eager": ("enforce_eager",),
    "rollout.vllm_max_num_seqs": ("max_num_seqs",),
    "rollout.vllm_enable_prefix_caching": ("enable_prefix_caching",),
    "rollout.vllm_enable_expert_parallel": ("enable_expert_parallel",),
    "rollout.vllm_quantization": ("quantization",),
    "rollout.vllm_limit_mm_per_prompt": ("limit_mm_per_prompt",),
    "rollout.sleep_level": (
        "enable_sleep_mode",
        "sleep_mode_offload_cudagraph",
        "sleep_preserve_parameter_names",
        "enable_cumem_allocator",
    ),
    "data.min_pixels and data.max_pixels": ("mm_processor_kwargs",),
    "student.model": (
        "model",
        "model_weights",
        "served_model_name",
        "tokenizer",
        "tokenizer_mode",
        "skip_tokenizer_init",
        "hf_config_path",
        "hf_overrides",
        "model_class_overrides",
        "config_format",
        "runner",
        "convert",
        "pooler_config",
    ),
    "student.model_revision": ("revision", "code_revision", "tokenizer_revision"),
    "student.trust_remote_code": ("trust_remote_code",),
}
_REASONS = {
    "is set by the trainer, whose ranks vLLM runs in": (
        "distributed_executor_backend",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
        "data_parallel_size",
        "data_parallel_rank",
        "data_parallel_start_rank",
        "data_parallel_size_local",
        "data_parallel_address",
        "data_parallel_rpc_port",
        "data_parallel_hybrid_lb",
        "data_parallel_external_lb",
        "data_parallel_multi_port_external_lb",
        "data_parallel_backend",
        "enable_elastic_ep",
        "enable_fault_tolerance",
        "master_addr",
        "master_port",
        "nnodes",
        "node_rank",
        "device_ids",
        "worker_cls",
        "worker_extension_cls",
        "scheduler_cls",
        "tokens_only",
    ),
    "is set by the trainer, which sends the weights": (
        "load_format",
        "model_loader_extra_config",
        "ignore_patterns",
        "download_dir",
        "weight_transfer_config",
        "enable_eplb",
        "eplb_config",
        "cpu_offload_gb",
        "cpu_offload_params",
        "offload_backend",
        "offload_group_size",
        "offload_num_in_group",
        "offload_prefetch_step",
        "offload_params",
        "language_model_only",
        "mm_encoder_only",
    ),
    "quantizes otherwise than rollout.vllm_quantization, and the weights that arrive could not be loaded": (
        "quantization_config",
        "allow_deprecated_quantization",
    ),
    "gives vLLM adapters, and it gets the student's weights with adapters merged": (
        "enable_lora",
        "max_loras",
        "max_lora_rank",
        "max_cpu_loras",
        "default_mm_loras",
        "fully_sharded_loras",
        "lora_dtype",
        "lora_target_modules",
        "enable_tower_connector_lora",
        "specialize_active_lora",
        "enable_mixed_moe_lora_format",
        "enable_moe_shared_loras",
    ),
    "keeps keys and values of old weights in a cache that is not reset": (
        "kv_transfer_config",
        "kv_events_config",
        "ec_transfer_config",
        "ec_manager_config",
        "kv_offloading_size",
        "kv_offloading_backend",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
    ),
    "would change the distribution that is sampled from, or its log-probabilities": (
        "logprobs_mode",
        "max_logprobs",
        "logits_processors",
        "speculative_config",
        "spec_method",
        "spec_model",
        "spec_tokens",
        "watermark_config",
        "diffusion_config",
        "return_sampling_mask",
        "generation_config",
        "override_generation_config",
        "seed",
    ),
}


def _refused() -> dict[str, str]:
    """Return why each argument that is decided elsewhere can't be set."""
    found = {name: f"is decided by {key}; set that" for key, names in _BY_RECIPE_KEY.items() for name in names}
    return found | {name: reason for reason, names in _REASONS.items() for name in names}


REFUSED: Mapping[str, str] = MappingProxyType(_refused())
"""Why each of vLLM's arguments that a recipe may not set is refused."""


def describe_refused(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each argument that a recipe may not set."""
    for name, value in arguments.items():
        if name == _TOKEN:
            yield f"{name}: must not be in a recipe, which is copied into output_dir; set HF_TOKEN in the environment"
        elif reason := REFUSED.get(name) or ("is internal to vLLM" if name.startswith("_") else None):
            yield f"{name} = {value}: {reason}"


def describe_unknown(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each argument that the installed vLLM does not have; nothing where it is not installed."""
    known = engine_arguments()
    if known is None:
        return
    for name, value in arguments.items():
        if name not in {*known, *REFUSED, _TOKEN} and not name.startswith("_"):
            allowed = sorted(known - REFUSED.keys())
            close = difflib.get_close_matches(name, allowed, n=1)
            hint = f"did you mean {close[0]}?" if close else "see vLLM's EngineArgs for their names"
            yield f"{name} = {value}: the installed vLLM has no such argument; {hint}"


@functools.cache
def engine_arguments() -> frozenset[str] | None:
    """Return the names of the arguments of the installed vLLM's engine; None where there is none, or it hides them."""
    spec = importlib.util.find_spec("vllm")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    path = next((folder / _SOURCE for folder in folders if (folder / _SOURCE).is_file()), None)
    if path is None:
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owner = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "EngineArgs"), None)
    if owner is None:
        return None
    fields = [node.target for node in owner.body if isinstance(node, ast.AnnAssign)]
    return frozenset(target.id for target in fields if isinstance(target, ast.Name))

"""The fields of Megatron-Core's configuration that `megatron.megatron_extra_kwargs` may set, and their types.

They are read from the source text of the installed release: importing it would import torch.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, List, Literal, Optional, Tuple, Union  # noqa: UP035  (the names in Megatron-Core's annotations)

from pydantic import TypeAdapter, ValidationError

_SOURCES = {
    "ModelParallelConfig": "core/model_parallel_config.py",
    "TransformerConfig": "core/transformer/transformer_config.py",
}
_TYPES: dict[str, Any] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list": list,
    "List": List,  # noqa: UP006
    "tuple": tuple,
    "Tuple": Tuple,  # noqa: UP006
    "Optional": Optional,
    "Union": Union,
    "Literal": Literal,
}
_NO_TEXT = Literal["\0"]  # the type of an annotation that names a class of Python: no value of a recipe has it

_BY_RECIPE_KEY = {
    "parallel.tensor_model_parallel_size": ("tensor_model_parallel_size",),
    "parallel.pipeline_model_parallel_size": ("pipeline_model_parallel_size",),
    "parallel.virtual_pipeline_model_parallel_size": ("virtual_pipeline_model_parallel_size",),
    "parallel.context_parallel_size": ("context_parallel_size",),
    "parallel.expert_model_parallel_size": ("expert_model_parallel_size",),
    "parallel.expert_tensor_parallel_size": ("expert_tensor_parallel_size", "moe_extended_tp"),
    "parallel.sequence_parallel": ("sequence_parallel",),
    "parallel.decoder_first_pipeline_num_layers": ("num_layers_in_first_pipeline_stage",),
    "parallel.decoder_last_pipeline_num_layers": ("num_layers_in_last_pipeline_stage",),
    "parallel.pipeline_model_parallel_layout": (
        "pipeline_model_parallel_layout",
        "account_for_embedding_in_pipeline_split",
        "account_for_loss_in_pipeline_split",
    ),
    "parallel.recompute_granularity": ("recompute_granularity", "moe_layer_recompute"),
    "parallel.recompute_method": ("recompute_method",),
    "parallel.recompute_num_layers": ("recompute_num_layers",),
    "parallel.recompute_modules": ("recompute_modules",),
    "train.dtype": ("params_dtype", "pipeline_dtype", "fp16", "bf16", "enable_autocast", "autocast_dtype"),
    "train.attention_backend": ("attention_backend",),
    "train.moe_aux_loss_coeff": ("moe_aux_loss_coeff",),
    "megatron.gradient_accumulation_fusion": ("gradient_accumulation_fusion",),
    "megatron.masked_softmax_fusion": ("masked_softmax_fusion",),
    "megatron.bias_swiglu_fusion": ("bias_activation_fusion",),
    "megatron.apply_rope_fusion": ("apply_rope_fusion",),
    "megatron.moe_token_dispatcher_type": ("moe_token_dispatcher_type",),
    "megatron.moe_permute_fusion": ("moe_permute_fusion",),
    "megatron.moe_grouped_gemm": ("moe_grouped_gemm", "moe_use_legacy_grouped_gemm"),
    "megatron.moe_router_dtype": ("moe_router_dtype",),
    "megatron.moe_z_loss_coeff": ("moe_z_loss_coeff",),
    "megatron.moe_shared_expert_overlap": ("moe_shared_expert_overlap",),
    "megatron.fp8_format": ("fp8",),
    "megatron.fp8_recipe": ("fp8_recipe",),
}
_OF_THE_CHECKPOINT = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "ffn_hidden_size",
    "kv_channels",
    "softmax_scale",
    "softmax_type",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "add_bias_linear",
    "add_qkv_bias",
    "gated_linear_unit",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "num_moe_experts",
    "rotary_interleaved",
    "window_size",
    "window_attn_skip_freq",
    "normalization",
    "qk_layernorm",
    "qk_l2_norm",
    "attention_output_gate",
    "multi_latent_attention",
    "no_rope_freq",
    "experimental_attention_variant",
    "dsa_indexer_n_heads",
    "dsa_indexer_head_dim",
    "dsa_indexer_topk",
    "linear_attention_freq",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_limited_devices",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_apply_probs_on_input",
    "moe_latent_size",
    "mrope_section",
    "is_hybrid_model",
    "apply_residual_connection_post_layernorm",
    "heterogeneous_block_specs",
)
_OF_THE_TRAINING = (
    "calculate_per_token_loss",
    "variable_seq_lengths",
    "overlap_p2p_comm",
    "batch_p2p_comm",
    "batch_p2p_sync",
    "use_ring_exchange_p2p",
    "deallocate_pipeline_outputs",
    "microbatch_group_size_per_vp_stage",
    "defer_embedding_wgrad_compute",
    "wgrad_deferral_limit",
    "hybrid_context_parallel",
    "hierarchical_context_parallel_sizes",
    "max_seqlen_per_dp_cp_rank",
    "mtp_num_layers",
    "mtp_loss_scaling_factor",
    "mtp_standalone",
    "perform_initialization",
    "use_cpu_initialization",
    "init_model_with_meta_device",
    "transformer_impl",
    "moe_router_load_balancing_type",
    "moe_router_bias_update_rate",
    "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity",
    "moe_token_dropping",
    "moe_router_force_load_balancing",
    "moe_enable_routing_replay",
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "cross_entropy_loss_fusion",
    "cross_entropy_fusion_impl",
    "flash_decode",
    "use_inference_optimized_layers",
    "test_mode",
    "num_microbatches_with_partial_activation_checkpoints",
    "use_te_rng_tracker",
    "fp32_residual_connection",
    "tp_comm_overlap",
    "qk_clip",
    "hidden_dropout",
    "attention_dropout",
    "fp8_param",
    "fp4",
    "fp4_recipe",
    "fp4_param",
    "cpu_offloading",
    "cpu_offloading_num_layers",
    "cpu_offloading_activations",
    "cpu_offloading_weights",
    "cpu_offloading_double_buffering",
    "enable_cuda_graph",
    "external_cuda_graph",
    "cuda_graph_impl",
    "cuda_graph_scope",
)


def _refused() -> dict[str, str]:
    """Return why each field that is decided elsewhere can't be set."""
    found = {field: f"is decided by {key}; set that" for key, fields in _BY_RECIPE_KEY.items() for field in fields}
    found |= dict.fromkeys(_OF_THE_CHECKPOINT, "is decided by the student's checkpoint")
    return found | dict.fromkeys(_OF_THE_TRAINING, "is decided by the training loop, which relies on its value")


REFUSED: Mapping[str, str] = MappingProxyType(_refused())
"""Why each of Megatron-Core's fields that a recipe may not set is refused."""


@functools.cache
def field_types() -> Mapping[str, Any]:
    """Return the types of the fields of the installed Megatron-Core's TransformerConfig, by name.

    A part of a type that is a class of Python is replaced by one that no value of a recipe has.

    Raises:
        FileNotFoundError: Megatron-Core is not installed.
    """
    spec = importlib.util.find_spec("megatron")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    types: dict[str, Any] = {}
    for name, file in _SOURCES.items():
        path = next((folder / file for folder in folders if (folder / file).is_file()), None)
        if path is None:
            raise FileNotFoundError(f"megatron/{file}: Megatron-Core is not installed")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        owner = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                types[node.target.id] = _type_of(node.annotation)
    return MappingProxyType(types)


def describe_problems(extra: Mapping[str, Any]) -> Iterator[str]:
    """Yield one line for each entry of `megatron_extra_kwargs` that can't be set, after the name of the key."""
    types = field_types()
    for name, value in extra.items():
        entry = f"{name} = {json.dumps(value, default=str)}"
        if name in REFUSED:
            yield f"{entry}: {REFUSED[name]}"
        elif name not in types or name.startswith("_"):
            near = difflib.get_close_matches(name, [known for known in types if known not in REFUSED], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            yield f"{entry}: Megatron-Core's TransformerConfig has no such field{hint}"
        elif types[name] == _NO_TEXT:
            yield f"{entry}: takes an object of Python, which a recipe can't contain; leave it out"
        elif not _is_of_type(value, types[name]):
            yield f"{entry}: must be {_describe(types[name])}"


def _type_of(node: ast.expr) -> Any:
    """Return the type that an annotation names, with `_NO_TEXT` for classes."""
    match node:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            return _type_of(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return _TYPES.get(name, _NO_TEXT)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_type_of(left), _type_of(right)]  # noqa: UP007  (types that are known at run time)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return Literal[ast.literal_eval(inner)]
        case ast.Subscript(value=ast.Name(id=name), slice=inner) if name in _TYPES:
            parts = tuple(map(_type_of, inner.elts)) if isinstance(inner, ast.Tuple) else _type_of(inner)
            return _NO_TEXT if parts == _NO_TEXT else _TYPES[name][parts]
    return _NO_TEXT


def _is_of_type(value: Any, kind: Any) -> bool:
    try:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)
    except (ValidationError, TypeError, ValueError):
        return False
    return True


def _describe(kind: Any) -> str:
    """Return a type in words: `int or null`, `one of a, b, or null`."""
    origin, parts = getattr(kind, "__origin__", None), getattr(kind, "__args__", ())
    if kind is type(None):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is Union:
        return " or ".join(_describe(part) for part in parts if part != _NO_TEXT)
    names = {bool: "true or false", int: "an integer", float: "a number", str: "a text"}
    return names.get(kind, "a list")

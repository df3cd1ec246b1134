"""Tiny random checkpoints of every text family, and of the variants that a family has."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from checkpoints import tiny_tokenizer
from families.case import Case, Reference, measure
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

__all__ = ["CASES", "SIZES", "build", "measure", "open_reference", "reference", "tiny_family", "write"]

SIZES = dict(
    vocab_size=99,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.08,
    tie_word_embeddings=False,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
HEADS = dict(head_dim=16)
EXPERTS = dict(moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2)
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
)
ROUTED = dict(
    moe_intermediate_size=24,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    routed_scaling_factor=1.5,
    norm_topk_prob=True,
)
MIXED = dict(mlp_layer_types=["dense"] + ["sparse"] * 3)
ALTERNATING = dict(layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4)
DELTA = dict(
    layer_types=["linear_attention", "full_attention"] * 2,
    full_attention_interval=2,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)


def rope(rope_type: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **more}}


YARN = rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=1.0
)
HALF_YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64, mscale=0.707, mscale_all_dim=0.707)
UNTRUNCATED = rope(
    "yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0, truncate=False
)
HALF = rope(partial_rotary_factor=0.5)
DENSE = ("TP2", "TP2+SP", "PP2", "CP2")
MIXTURE = ("TP2+SP", "PP2", "CP2", "EP2", "TP2+SP+EP2")

CASES = (
    Case("llama", "Llama", rope(), DENSE),
    Case("qwen2", "Qwen2", rope(), DENSE),
    Case("qwen2, windows", "Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=2), DENSE),
    Case("qwen3", "Qwen3", HEADS, DENSE),
    Case(
        "qwen3, windows", "Qwen3", HEADS | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1), DENSE
    ),
    Case("ernie4_5", "Ernie4_5", HEADS | dict(use_bias=False), DENSE),
    Case("ernie4_5, tied", "Ernie4_5", HEADS | dict(use_bias=False, tie_word_embeddings=True), DENSE),
    Case("glm4", "Glm4", HEADS | HALF | dict(attention_bias=True), DENSE),
    Case("mistral", "Mistral", HEADS | dict(sliding_window=None), DENSE),
    Case("mistral, windows", "Mistral", HEADS | dict(sliding_window=4), DENSE),
    Case("seed_oss", "SeedOss", HEADS | dict(residual_dropout=0.0, attention_dropout=0.0), DENSE),
    Case("smollm3", "SmolLM3", dict(no_rope_layers=[1] * 4), DENSE),
    Case("smollm3, some layers without rope", "SmolLM3", dict(no_rope_layers=[1, 1, 0, 1]), DENSE),
    Case(
        "qwen2_moe",
        "Qwen2Moe",
        EXPERTS | dict(shared_expert_intermediate_size=48, decoder_sparse_step=1, norm_topk_prob=False),
        MIXTURE,
    ),
    Case("qwen3_moe", "Qwen3Moe", HEADS | EXPERTS | dict(norm_topk_prob=True), MIXTURE),
    Case(
        "qwen3_moe, some layers dense",
        "Qwen3Moe",
        HEADS | EXPERTS | dict(norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[3]),
        MIXTURE,
    ),
    Case(
        "qwen3_moe, windows",
        "Qwen3Moe",
        HEADS | EXPERTS | dict(norm_topk_prob=True, use_sliding_window=True, sliding_window=4),
        MIXTURE,
    ),
    Case(
        "qwen3_next",
        "Qwen3Next",
        HEADS | EXPERTS | DELTA | rope(partial_rotary_factor=0.25) | dict(shared_expert_intermediate_size=48),
        ("TP2+SP", "PP2", "EP2", "TP2+SP+EP2"),
    ),
    Case("olmoe", "Olmoe", dict(num_experts=4, num_experts_per_tok=2), MIXTURE),
    Case("dots1", "Dots1", HEADS | ROUTED, MIXTURE),
    Case("glm4_moe", "Glm4Moe", HEADS | HALF | ROUTED | dict(attention_bias=True, use_qk_norm=True), MIXTURE),
    Case("glm4_moe_lite", "Glm4MoeLite", LATENT | ROUTED | MIXED, MIXTURE),
    Case("deepseek_v2", "DeepseekV2", LATENT | ROUTED | dict(topk_method="greedy", norm_topk_prob=False), MIXTURE),
    Case("deepseek_v3", "DeepseekV3", LATENT | ROUTED, MIXTURE),
    Case("deepseek_v3, yarn", "DeepseekV3", LATENT | ROUTED | YARN, MIXTURE),
    Case(
        "deepseek_v3, queries without rank", "DeepseekV3", LATENT | ROUTED | HALF_YARN | dict(q_lora_rank=None), MIXTURE
    ),
    Case(
        "deepseek_v3, groups of experts",
        "DeepseekV3",
        LATENT | ROUTED | dict(n_routed_experts=8, num_experts_per_tok=4, n_group=4, topk_group=2),
        MIXTURE,
    ),
    Case("kimi_k2", "DeepseekV3", LATENT | ROUTED, MIXTURE, written_as="kimi_k2"),
    Case(
        "minimax_m2",
        "MiniMaxM2",
        HEADS | HALF | dict(num_local_experts=4, num_experts_per_tok=2, rotary_dim=8),
        MIXTURE,
    ),
    Case(
        "hy_v3",
        "HYV3",
        HEADS | EXPERTS | MIXED | dict(num_shared_experts=1, router_scaling_factor=1.5, first_k_dense_replace=1),
        MIXTURE,
    ),
    Case(
        "gpt_oss",
        "GptOss",
        HEADS | ALTERNATING | UNTRUNCATED | dict(num_local_experts=4, num_experts_per_tok=2),
        MIXTURE,
    ),
)
"""Every family; the variants of one family follow it."""


def build(case: Case, **changes: Any) -> PreTrainedModel:
    """Return transformers' model of a case, with random weights in which no mix-up can hide."""
    torch.manual_seed(0)
    # mcore-bridge registers its own for all models of the process; it can not read configurations of transformers 5.19.
    ROPE_INIT_FUNCTIONS.pop("default", None)
    config = getattr(transformers, f"{case.hf_class}Config")(**{**SIZES, **rope(), **case.values, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name and name.endswith("weight"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("bias"):  # of routers as well, which are buffers
                tensor.normal_(0, 0.1)
            elif name.endswith("sinks"):
                tensor.normal_(0, 1)
    return model.eval()


def write(case: Case, model: PreTrainedModel, folder: Path | None = None) -> Path:
    """Write a checkpoint with a tokenizer and return its folder."""
    folder = folder or Path(tempfile.mkdtemp(prefix=f"tiny-{case.hf_class}-"))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if case.written_as is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": case.written_as}))
    return folder


@functools.cache
def tiny_family(name: str, **changes: Any) -> Path:
    """Return a checkpoint folder of the case of this name, made once a session."""
    case = next(case for case in CASES if case.name == name)
    return write(case, build(case, **changes))


def open_reference(case: Case, folder: Path) -> PreTrainedModel:
    """Open a checkpoint of a case with transformers."""
    ROPE_INIT_FUNCTIONS.pop("default", None)  # see `build`
    model_class = getattr(transformers, f"{case.hf_class}ForCausalLM")
    config = model_class.config_class.from_pretrained(folder)
    config.model_type = model_class.config_class.model_type  # by which transformers joins experts
    return model_class.from_pretrained(folder, config=config, dtype=torch.float32, attn_implementation="eager").eval()


def reference(case: Case) -> tuple[Path, Reference]:
    """Return a new checkpoint of a case, and what transformers computes with it."""
    model = build(case)
    path = write(case, model)
    found = Reference.of_language_model(model)
    found.take_gradients(model)
    return path, found

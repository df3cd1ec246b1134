"""Sizes of whole models, from their config.json alone."""

import json

import pytest
from recipe_workspace import DENSE, MIXTURE

from megatron_gkd.errors import UserError
from megatron_gkd.planning.model_sizes import read_sizes


def sizes_of(folder, config):
    (folder / "config.json").write_text(json.dumps(config))
    return read_sizes(str(folder))


def test_a_dense_model(tmp_path):
    config = {**DENSE, "head_dim": 16}
    tied = sizes_of(tmp_path, {**config, "tie_word_embeddings": True})
    attention = 64 * 16 * (8 + 2 + 2 + 8) + 2 * 16
    layer = attention + 3 * 64 * 48 + 2 * 64
    assert tied.parameters == 320 * 64 + 8 * layer + 64 and tied.embedding == 0
    assert (tied.kv_values, tied.kv_heads, tied.largest_tensor) == (8 * 2 * 2 * 16, 2, 320 * 64)
    untied = sizes_of(tmp_path, {**config, "tie_word_embeddings": False})
    assert untied.parameters == tied.parameters + 320 * 64 and untied.embedding == 320 * 64
    assert untied.active == tied.active


def test_a_mixture_of_experts(tmp_path):
    sizes = sizes_of(tmp_path, {**MIXTURE, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1})
    assert sizes.experts == 8 * 8 * 3 * 64 * 32 and (sizes.num_experts, sizes.experts_per_token) == (8, 2)
    assert sizes.largest_experts == 8 * 2 * 64 * 32, "gate and up of all experts of a layer"
    assert sizes.active == sizes.parameters - sizes.embedding - sizes.experts * 3 // 4


def test_a_latent_cache_is_not_shared_by_heads(tmp_path):
    config = {
        **{key: value for key, value in DENSE.items() if key != "num_key_value_heads"},
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "kv_lora_rank": 16,
        "q_lora_rank": None,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    sizes = sizes_of(tmp_path, config)
    assert (sizes.kv_values, sizes.kv_heads) == (8 * (16 + 4), 1)
    assert sizes.experts == 7 * 4 * 3 * 64 * 16


def test_a_config_that_is_none_is_one_line(tmp_path):
    with pytest.raises(UserError, match="its architecture"):
        sizes_of(tmp_path, {**DENSE, "architectures": ["Nothing"]})

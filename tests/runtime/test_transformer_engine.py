"""The PyTorch fallback computes what Transformer Engine's classes promise."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from checkpoints import tiny_checkpoint

from megatron_gkd.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def portable():
    import megatron_gkd.runtime.preload  # noqa: F401


def naive_attention(q, k, v, visible):
    """q [s,h,d], k and v [t,g,d], visible [s,t] -> [s,h,d]."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hst,thd->shd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)


def attention(dropout=0.0):
    from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, attention_dropout=dropout)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0))
    return TEDotProductAttention(config, 1, attn_mask_type=AttnMaskType.causal, pg_collection=groups)


def qkv(queries=6, keys=6, batch=()):
    torch.manual_seed(0)
    return [torch.randn(n, *batch, heads, 8, dtype=torch.float64) for n, heads in ((queries, 4), (keys, 2), (keys, 2))]


@pytest.mark.parametrize("queries", [6, 1, 4])
def test_causal_attention_with_grouped_queries_is_aligned_to_the_last_key(queries):
    q, k, v = qkv(queries, 6, batch=(3,))
    visible = torch.ones(queries, 6, dtype=torch.bool).tril(6 - queries)
    out = attention()(q, k, v)
    for b in range(3):
        expected = naive_attention(q[:, b], k[:, b], v[:, b], visible).flatten(1)
        torch.testing.assert_close(out[:, b], expected)


def test_packed_sequences_do_not_see_each_other():
    q, k, v = qkv()
    boundaries = torch.tensor([0, 2, 2, 6], dtype=torch.int32)
    packed = SimpleNamespace(cu_seqlens_q_padded=None, cu_seqlens_q=boundaries)
    visible = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool().tril()
    torch.testing.assert_close(
        attention()(q, k, v, packed_seq_params=packed), naive_attention(q, k, v, visible).flatten(1)
    )


def test_an_attention_bias_is_refused():
    q, k, v = qkv(batch=(1,))
    with pytest.raises(ValueError, match="attention bias"):
        attention()(q, k, v, attention_bias=torch.zeros(1))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norms(kind, zero_centered):
    from megatron_gkd.runtime.transformer_engine.norm import TENorm

    config = SimpleNamespace(
        normalization=kind,
        layernorm_zero_centered_gamma=zero_centered,
        params_dtype=torch.float32,
        sequence_parallel=True,
    )
    norm = TENorm(config, 8, eps=1e-6)
    assert norm.weight.sequence_parallel
    x = torch.randn(5, 8)
    reference = torch.nn.RMSNorm(8, eps=1e-6) if kind == "RMSNorm" else torch.nn.LayerNorm(8, eps=1e-6)
    torch.testing.assert_close(norm(x), reference(x))
    assert norm(x.bfloat16().requires_grad_()).isfinite().all()


def test_the_package_can_be_imported_by_name():
    import transformer_engine.pytorch

    assert transformer_engine.is_pytorch_fallback and isinstance(transformer_engine.pytorch.Linear, type)


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("attn", "dtype", "chosen"),
    [
        ("auto", BF16, "auto"),
        ("auto", FP32, "sdpa"),
        ("sdpa", BF16, "sdpa"),
        ("sdpa", FP32, "sdpa"),
        ("flash", BF16, "flash"),
        ("fused", BF16, "fused"),
        ("flash", FP32, "train.attention_backend = flash: needs dtype = bf16; auto and sdpa run everywhere"),
        ("fused", FP32, "train.attention_backend = fused: needs dtype = bf16; auto and sdpa run everywhere"),
        (
            "unfused",
            BF16,
            "train.attention_backend = unfused: is no attention for packed rows; auto and sdpa run everywhere",
        ),
    ],
)
def test_the_attention_on_a_gpu_with_transformer_engine(attn, dtype, chosen, monkeypatch):
    from megatron_gkd.runtime import transformer_engine

    monkeypatch.setattr(transformer_engine, "is_real", lambda: True)
    monkeypatch.setattr(transformer_engine.portability, "builds_on_host", lambda: False)
    if chosen.startswith("train."):
        with pytest.raises(UserError, match=f"^{re.escape(chosen)}$"):
            transformer_engine.choose_attention(attn, dtype)
    else:
        assert transformer_engine.choose_attention(attn, dtype) == chosen


@pytest.mark.parametrize(("on_host", "what"), [(True, "a GPU"), (False, "Transformer Engine, which is not installed")])
def test_flash_attention_is_refused_without_its_requirements(on_host, what, monkeypatch):
    from megatron_gkd.runtime import transformer_engine

    monkeypatch.setattr(transformer_engine, "is_real", lambda: False)
    monkeypatch.setattr(transformer_engine.portability, "builds_on_host", lambda: on_host)
    with pytest.raises(UserError, match=f"train.attention_backend = flash: needs {what}"):
        transformer_engine.choose_attention("flash", BF16)
    assert transformer_engine.choose_attention("auto", BF16) == "auto", "the fallback's"


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, None),
        ({"window_size": (3, 0)}, None),
        ({"window_size": (3, 0), "context_parallel_size": 2}, "attention windows under context parallelism"),
        ({"softmax_type": "learnable"}, "attention sinks"),
    ],
)
def test_torch_attends_where_transformer_engine_has_no_kernel(changes, missing):
    from megatron_gkd.runtime.transformer_engine import needs_torch_attention

    config = SimpleNamespace(**{"softmax_type": "vanilla", "window_size": None, "context_parallel_size": 1} | changes)
    assert needs_torch_attention("sdpa", config)
    assert needs_torch_attention("auto", config) is (missing is not None)
    if missing is None:
        assert not needs_torch_attention("flash", config)
    else:
        message = f"train.attention_backend = flash: has no {missing} for packed rows; auto and sdpa have"
        with pytest.raises(UserError, match=f"^{message}$"):
            needs_torch_attention("flash", config)


def attention_of(rank, world_size, path, attn, dtype):
    """The class of the core attention that is built beside a Transformer Engine with one of its own."""
    from megatron_gkd.models.checkpoint import Checkpoint
    from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
    from megatron_gkd.runtime.mesh import Layout, destroy_mesh, initialize_mesh
    from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

    from megatron.core.extensions import transformer_engine_spec_provider as spec_provider

    installed = spec_provider.TEDotProductAttention
    spec_provider.TEDotProductAttention = type("RealAttention", (TEDotProductAttention,), {})
    try:
        mesh = initialize_mesh(Layout(), seed=1)
        model = MegatronModel.load(Checkpoint.open(str(path)), mesh, BuildOptions(dtype=dtype, attn=attn))
        return [type(layer.self_attention.core_attention).__name__ for layer in model.chunks[0].decoder.layers]
    finally:
        spec_provider.TEDotProductAttention = installed
        destroy_mesh()


@pytest.mark.parametrize(
    ("attn", "dtype", "name"),
    [("auto", FP32, "TEDotProductAttention"), ("auto", BF16, "RealAttention"), ("sdpa", BF16, "TEDotProductAttention")],
)
def test_fp32_uses_torch_attention_beside_transformer_engine(attn, dtype, name, gloo_world):
    assert gloo_world(1).run(attention_of, tiny_checkpoint("qwen3"), attn, dtype) == [[name] * 4]

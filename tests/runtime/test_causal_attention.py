"""Sliding windows and attention sinks of the PyTorch fallback, forward and backward."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

HEADS, GROUPS, SIZE = 4, 2, 8


def inputs(queries, keys):
    torch.manual_seed(0)
    shapes = ((queries, HEADS), (keys, GROUPS), (keys, GROUPS))
    q, k, v = (torch.randn(1, heads, n, SIZE, dtype=torch.float64, requires_grad=True) for n, heads in shapes)
    return q, k, v, torch.randn(HEADS, dtype=torch.float64, requires_grad=True)


def naive(q, k, v, window=None, sinks=None, scale=None):
    k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (scale or 1 / math.sqrt(SIZE))
    ages = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])
    hidden = ages < 0 if window is None else (ages < 0) | (ages >= window)
    scores = scores.masked_fill(hidden, -math.inf)
    if sinks is None:
        return scores.softmax(-1) @ v
    with_sink = torch.cat([scores, sinks[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    return with_sink.softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 4, 64])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (3, 9), (1, 9)])
def test_windows_and_sinks_with_their_gradients(queries, keys, window, has_sinks, scale, monkeypatch):
    from megatron_gkd.runtime.transformer_engine import causal_attention

    monkeypatch.setattr(causal_attention, "_WINDOW_BLOCK", 4)  # several blocks, the last of them shorter
    *qkv, sinks = inputs(queries, keys)
    given = sinks if has_sinks else None
    leaves = [*qkv, sinks] if has_sinks else qkv
    expected = naive(*qkv, window, given, scale)
    found = causal_attention.CausalAttention(scale, window, given)(*qkv)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def attention_config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes = dict(
        num_layers=2,
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        attention_dropout=0.0,
    )
    return TransformerConfig(**sizes, **changes)


def core_attention(config, layer_number, cp_group):
    from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

    from megatron.core.transformer.enums import AttnMaskType

    groups = SimpleNamespace(cp=cp_group)
    return TEDotProductAttention(config, layer_number, attn_mask_type=AttnMaskType.causal, pg_collection=groups)


WITH_SINKS = {"softmax_type": "learnable", "window_size": (2, 0), "window_attn_skip_freq": [1, 0]}


def packed_attention(rank, world_size, layer_number):
    """Attend to two packed sequences under context parallelism; return this rank's output and gradients."""
    import torch.distributed as dist

    import megatron_gkd.runtime.preload  # noqa: F401
    from megatron_gkd.runtime.context_parallel import context_parallel_indices

    core = core_attention(attention_config(**WITH_SINKS, params_dtype=torch.float64), layer_number, dist.group.WORLD)
    *qkv, sinks = inputs(20, 20)
    core.softmax_offset.data = sinks.detach()
    boundaries = torch.tensor([0, 8, 20], dtype=torch.int32)
    own = context_parallel_indices(boundaries, rank, world_size)
    own_qkv = [x.detach()[0].transpose(0, 1)[own].requires_grad_() for x in qkv]
    packing = SimpleNamespace(cu_seqlens_q_padded=boundaries, cu_seqlens_q=boundaries)
    out = core(*own_qkv, packed_seq_params=packing)
    out.square().sum().backward()
    return own, out.detach(), [x.grad for x in own_qkv], core.softmax_offset.grad


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("layer_number", [1, 2])
def test_packed_sequences_under_context_parallelism(layer_number, world_size, gloo_world):
    *qkv, sinks = inputs(20, 20)
    window = {1: 3, 2: None}[layer_number]
    rows = [[x[:, :, start:end] for x in qkv] for start, end in ((0, 8), (8, 20))]
    expected = torch.cat([naive(*row, window, sinks) for row in rows], 2)
    gradients = torch.autograd.grad(expected.square().sum(), [*qkv, sinks])
    results = gloo_world(world_size).run(packed_attention, layer_number)
    for own, out, own_gradients, _ in results:
        torch.testing.assert_close(out, expected.detach()[0].transpose(0, 1).flatten(1)[own])
        for found, gradient in zip(own_gradients, gradients, strict=False):
            torch.testing.assert_close(found, gradient[0].transpose(0, 1)[own])
    torch.testing.assert_close(sum(result[3] for result in results), gradients[3])


def test_the_sinks_are_a_tensor_parallel_parameter():
    import megatron_gkd.runtime.preload  # noqa: F401

    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = attention_config(**WITH_SINKS, tensor_model_parallel_size=2)
    sinks = core_attention(config, 1, alone).softmax_offset
    assert sinks.shape == (HEADS // 2,) and sinks.tensor_model_parallel and sinks.partition_dim == 0


def test_what_is_not_causal_is_refused_with_a_window():
    import megatron_gkd.runtime.preload  # noqa: F401

    from megatron.core.transformer.enums import AttnMaskType

    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    core = core_attention(attention_config(window_size=(2, 0)), 1, alone)
    q, k, v, _ = (x.detach() for x in inputs(4, 4))
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    with pytest.raises(ValueError, match="windows and sinks need causal attention"):
        core(q, k, v, attn_mask_type=AttnMaskType.no_mask)

"""The gated delta rule in torch: token by token, and packed sequences apart from each other."""

from __future__ import annotations

import pytest
import torch

HEADS, SIZE, VALUE_SIZE = 2, 8, 4
BOUNDARIES = torch.tensor([0, 5, 5, 75], dtype=torch.int32)
"""Of packed sequences: a short one, an empty one, one that is longer than a chunk of the algorithm."""


@pytest.fixture(scope="module", autouse=True)
def installed():
    import megatron_gkd.runtime.preload  # noqa: F401


def inputs(length):
    from megatron_gkd.runtime.gated_delta_rule import l2norm

    torch.manual_seed(0)
    q, k = (l2norm(torch.randn(1, length, HEADS, SIZE)) for _ in range(2))
    v, g = torch.randn(1, length, HEADS, VALUE_SIZE), -torch.rand(1, length, HEADS)
    return [x.requires_grad_() for x in (q, k, v, g, torch.rand(1, length, HEADS))]


def token_by_token(q, k, v, g, beta):
    """The definition: the state decays, and each key's value in it is moved towards the token's."""
    state, outputs = torch.zeros(HEADS, SIZE, VALUE_SIZE), []
    for t in range(q.shape[1]):
        state = state * g[0, t].exp()[:, None, None]
        stored = torch.einsum("hd,hde->he", k[0, t], state)
        change = (v[0, t] - stored) * beta[0, t][:, None]
        state = state + torch.einsum("hd,he->hde", k[0, t], change)
        outputs.append(torch.einsum("hd,hde->he", q[0, t] / SIZE**0.5, state))
    return torch.stack(outputs)[None]


def pieces(x):
    return [one for one in x.split(BOUNDARIES.diff().tolist(), dim=1) if one.shape[1]]


def test_the_rule_and_its_gradient():
    from megatron_gkd.runtime.gated_delta_rule import chunk_gated_delta_rule

    leaves = inputs(75)
    q, k, v, g, beta = leaves
    out, state = chunk_gated_delta_rule(
        q, k, v, g=g, beta=beta, cu_seqlens=BOUNDARIES, use_qk_l2norm_in_kernel=False, output_final_state=False
    )
    expected = torch.cat([token_by_token(*each) for each in zip(*map(pieces, leaves), strict=True)], dim=1)
    assert state is None
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(out)
    found, gradients = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_convolution(has_bias):
    from megatron_gkd.runtime.gated_delta_rule import causal_conv1d

    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 75, 6), torch.randn(6, 4), torch.randn(6) if has_bias else None
    out, _ = causal_conv1d(x=x, weight=weight, bias=bias, activation="silu", cu_seqlens=BOUNDARIES)
    rows = []
    for sequence in pieces(x):
        padded = torch.cat([torch.zeros(1, 3, 6), sequence], dim=1)
        rows.append(sum(padded[:, i : i + sequence.shape[1]] * weight[:, i] for i in range(4)))
    expected = torch.cat(rows, dim=1) + (0 if bias is None else bias)
    torch.testing.assert_close(out, torch.nn.functional.silu(expected))
    with pytest.raises(ValueError, match="activation = gelu: not supported"):
        causal_conv1d(x, weight, activation="gelu")


def test_megatron_and_the_bridge_have_them():
    from megatron_gkd.runtime import gated_delta_rule

    from mcore_bridge.model.modules import gated_delta_net as of_bridge
    from megatron.core.ssm import gated_delta_net as of_megatron

    assert of_megatron.HAVE_FLA
    for module in (of_bridge, of_megatron):
        assert module.chunk_gated_delta_rule is gated_delta_rule.chunk_gated_delta_rule
        assert module.l2norm is gated_delta_rule.l2norm
    assert of_bridge.causal_conv1d is gated_delta_rule.causal_conv1d


def test_nothing_is_replaced_where_the_library_is_installed(monkeypatch):
    from megatron_gkd.runtime import gated_delta_rule

    monkeypatch.setattr(gated_delta_rule.importlib.util, "find_spec", lambda name: object())
    assert not gated_delta_rule.install_gated_delta_rule()

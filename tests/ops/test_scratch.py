"""The logits of a later microbatch reuse the memory of an earlier one's, and no two tensors share any."""

from __future__ import annotations

import pytest
import torch
from ops.oracle import random_logits

from megatron_gkd.ops import scratch
from megatron_gkd.ops.fused_linear import LinearHead, TokenTargets, fused_linear_divergence
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.spec import DivergenceSpec, TopKSpec


@pytest.fixture(autouse=True)
def empty_pool(monkeypatch):
    monkeypatch.setattr(scratch, "_free", [])


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_memory_is_reused_once_it_is_given_back(mode):
    like = torch.empty(0)
    with mode():
        first, second = scratch.take(like, 3, 8), scratch.take(like, 3, 8)
        assert first.data_ptr() != second.data_ptr()
        address = first.data_ptr()
        scratch.give_back(first[:, :5])
    smaller = scratch.take(like.double(), 2, 4)
    assert (smaller.data_ptr(), smaller.dtype, smaller.shape) == (address, torch.float64, (2, 4))
    assert scratch.take(like, 3, 8).data_ptr() not in (address, second.data_ptr())


def test_blocks_that_are_too_small_are_replaced():
    like = torch.empty(0)
    for rows in (1, 2, 3):
        scratch.give_back(scratch.take(like, rows, 8))
    assert [len(storage) for storage in scratch._free] == [3 * 8 * 4]


@pytest.mark.cpu
@pytest.mark.parametrize("topk", [TopKSpec(), TopKSpec(3, "bucket")])
def test_the_fused_head_reuses_its_logits_and_returns_none_of_them(topk):
    def results_of(seed):
        hidden, weight, *teacher = (random_logits(6, 4, seed=seed + i).requires_grad_() for i in range(4))
        student, teacher = LinearHead(hidden, OutputHead(weight)), LinearHead(teacher[0], OutputHead(teacher[1]))
        tokens = TokenTargets(torch.ones(6), torch.arange(6), torch.ones(6))
        total, token = fused_linear_divergence(student, teacher, tokens, DivergenceSpec(0.5), topk)
        return (total, *token), lambda: torch.autograd.grad(total, (hidden, weight))

    first, backward = results_of(0)
    before = [x.detach().clone() for x in first]
    addresses = {storage.data_ptr() for storage in scratch._free}
    assert len(addresses) == 2
    results_of(4)
    assert {storage.data_ptr() for storage in scratch._free} == addresses
    assert all(torch.equal(*pair) for pair in zip(first, before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(backward(), results_of(0)[1](), strict=True))

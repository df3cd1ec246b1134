"""The passes over a top-k: kernels against plain torch, operators of torch.library, and how much a chunk launches."""

import pytest
import torch
from ops.launches import count_launches
from ops.oracle import random_logits, relative_error

from megatron_gkd.ops import (
    DivergenceSpec,
    LinearHead,
    OutputHead,
    TokenTargets,
    TopKSpec,
    fused_linear_divergence,
    passes,
    topk_divergence,
    topk_passes,
    torch_topk_passes,
    vocab_parallel_topk,
)
from megatron_gkd.ops.spec import TopKShardSpec
from megatron_gkd.ops.topk_choice import _choose
from megatron_gkd.ops.topk_divergence import _backward, _forward
from megatron_gkd.ops.topk_statistics import compute_topk_forward

TAILS = ["renormalize", "bucket"]
needs_kernels = pytest.mark.skipif(passes._kernels is None, reason="no kernels are compiled")


def loss_and_gradients(tail, softcap, dtype):
    """Of a head, with cross-entropy, ignored labels, weights of 0 and ids that are missing for the student."""
    hidden, weight = (random_logits(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate([(12, 8), (65, 8)]))
    hidden.requires_grad_(), weight.requires_grad_()
    teacher = LinearHead(
        random_logits(12, 8, seed=2, dtype=dtype), OutputHead(random_logits(65, 8, seed=3, dtype=dtype))
    )
    labels = torch.arange(12) * 5
    labels[3] = -100
    weights = torch.rand(2, 12, generator=torch.Generator().manual_seed(4)) + 0.1
    weights[0, 2], weights[:, 5], weights[1, 7] = 0, 0, 0
    total, per_token = fused_linear_divergence(
        LinearHead(hidden, OutputHead(weight, softcap=softcap)),
        teacher,
        TokenTargets(weights[0], labels, weights[1]),
        DivergenceSpec(0.3, temperature=1.3, vocab_size=63),
        TopKSpec(5, tail),
    )
    total.backward()
    return (total.detach(), *per_token, hidden.grad, weight.grad)


@needs_kernels
@pytest.mark.cpu
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("tail", TAILS)
def test_kernels_equal_plain_torch_in_fp64(tail, softcap):
    """All that the head returns, in fp32 by kernels."""
    exact, found = (loss_and_gradients(tail, softcap, dtype) for dtype in (torch.float64, torch.float32))
    for actual, expected in zip(found, exact, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", TAILS)
def test_rows_of_weight_0_are_0_whatever_they_hold(tail, dtype):
    """By kernels and in plain torch, for both parts of the loss, with a softcap."""
    student, teacher = (random_logits(3, 20, seed=seed, dtype=dtype) for seed in (0, 1))
    student[1] = torch.nan
    spec = TopKShardSpec(DivergenceSpec(0.5).on_shard(20, 5.0), tail)
    labels = torch.tensor([1, 2, 3])
    topk = vocab_parallel_topk(teacher, 4)
    weight = torch.tensor([1.0, 0.0, 1.0], dtype=dtype)
    found = compute_topk_forward(student, topk, spec, labels=labels)
    out = torch.full_like(student, torch.nan)
    topk_passes.gradient(out, student, topk, found.gradient_rows(weight, labels, weight), spec)
    assert not out[1].any() and out[[0, 2]].isfinite().all() and out[[0, 2]].any(-1).all()


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("k", "ids"), [(1, [1]), (2, [1, 4]), (4, [1, 4, 2, 3])])
def test_nan_comes_first(dtype, k, ids):
    logits = torch.tensor([[1, torch.nan, 3, 3, torch.nan]], dtype=dtype)
    assert vocab_parallel_topk(logits, k).ids.tolist() == [ids]


@pytest.mark.cpu
def test_whole_rows_in_plain_torch_are_in_small_blocks(monkeypatch):
    """With labels too, which need all columns, as a bucket does."""
    widths, original = [], torch_topk_passes.row_blocks

    def record(rows, width, device):
        widths.append(width)
        return original(rows, width, device)

    monkeypatch.setattr(torch_topk_passes, "row_blocks", record)
    student, topk = random_logits(3, 20, seed=0).double(), vocab_parallel_topk(random_logits(3, 20, seed=1), 4)
    for with_labels in (False, True):
        labels, weight = (torch.arange(3), torch.ones(3).double()) if with_labels else (None, None)
        spec = TopKShardSpec(DivergenceSpec(0.5).on_shard(20), "renormalize")
        found = compute_topk_forward(student, topk, spec, labels=labels)
        rows = found.gradient_rows(torch.ones(3).double(), labels, weight)
        topk_passes.gradient(torch.empty_like(student), student, topk, rows, spec)
    assert widths == [4, 4, 4, 20, 4, 20]


@pytest.mark.cpu
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(tail, masked):
    s, t = random_logits(3, 7, seed=0).requires_grad_(), random_logits(3, 7, seed=1)
    mask = torch.tensor([True, False, True]) if masked else None
    topk = vocab_parallel_topk(t, 2, vocab_size=6, temperature=0.9)
    options = "jsd", 0.5, 0.9, 6, ""
    inputs = topk.ids, topk.values, topk.tail if tail == "bucket" else None, mask
    torch.library.opcheck(_forward, (s, *inputs, *options))
    _, *saved = _forward(s.detach(), *inputs, *options)
    torch.library.opcheck(_backward, (torch.ones(3), s.detach(), *inputs, *saved, *options))
    torch.library.opcheck(_choose, (t, 2, 0.9 if masked else None, 6, ""))


@pytest.mark.cpu
def test_compiles_without_a_break():
    s, t = random_logits(3, 7, seed=0).requires_grad_(), random_logits(3, 7, seed=1)

    def loss(student, teacher):
        topk = vocab_parallel_topk(teacher, 2)
        return topk_divergence(student, topk, DivergenceSpec(0.5), tail_mode="bucket").sum()

    (expected,) = torch.autograd.grad(loss(s, t), s)
    (actual,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(s, t), s)
    assert torch.equal(actual, expected)


@needs_kernels
@pytest.mark.cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", TAILS)
def test_a_chunk_is_a_few_launches(tail, dtype):
    """Four products, seven kernels."""
    _, four, of_chunk = count_launches(dtype, 0.5, TopKSpec(5, tail))
    assert of_chunk <= 11, four

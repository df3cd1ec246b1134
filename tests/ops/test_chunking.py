"""How the fused head divides its tokens, where logits lie, and which products run beside which collectives."""

import types

import pytest
import torch
import torch.distributed as dist
from ops.oracle import random_logits

from megatron_gkd.ops import chunking
from megatron_gkd.ops.add_product import _full_precision_sums, multiply_in_full_precision
from megatron_gkd.ops.chunking import ChunkedHead, Chunking, rows_within_budget, split_tokens
from megatron_gkd.ops.fused_linear import FusedLinearOptions, LinearHead, TokenTargets, fused_linear_divergence
from megatron_gkd.ops.head_gradient import DeferredProducts, HeadGradient
from megatron_gkd.ops.output_head import OutputHead
from megatron_gkd.ops.spec import DivergenceSpec


@pytest.mark.parametrize(
    ("tokens", "most", "sizes"),
    [
        (0, 5, []),
        (5, 5, [5]),
        (67, 16, [13, 13, 14, 13, 14]),
        (8192, 3533, [2816, 2816, 2560]),  # whole tiles
        (8192, 8192, [8192]),
        (2050, 1025, [1025, 1025]),  # a whole tile more is too much
        (1030, 1024, [515, 515]),
    ],
)
def test_chunks_are_few_and_alike(tokens, most, sizes):
    chunks = split_tokens(tokens, most)
    assert [chunk.stop - chunk.start for chunk in chunks] == sizes
    assert [i for chunk in chunks for i in range(chunk.start, chunk.stop)] == list(range(tokens))


@pytest.mark.parametrize(("kind", "most"), [("cpu", 1 << 30), ("cuda", 2 << 30), ("meta", 2 << 30)])
@pytest.mark.parametrize("buffers", [1, 2, 3])
def test_all_buffers_together_fit_into_the_budget(kind, most, buffers):
    rows = rows_within_budget(151937, torch.bfloat16, torch.device(kind), buffers)
    of_row = buffers * 151944 * 2
    assert rows * of_row <= most < (rows + 1) * of_row
    assert rows_within_budget(1 << 40, torch.float32, torch.device(kind)) == 1


def test_a_chunk_that_waits_has_a_buffer_more(monkeypatch):
    monkeypatch.setattr(chunking, "CPU_LOGITS_BYTES", 6 * 8 * 4 * 2)
    hidden = torch.zeros(12, 4)

    def found(**options):
        chosen = Chunking.choose(
            hidden[: options.pop("tokens", 12)], 8, 2, options.pop("chunk_tokens", None), **options
        )
        return len(chosen.chunks), chosen.is_overlapped

    assert found(may_overlap=False) == (2, False)
    assert found(may_overlap=True) == (3, True)  # chunks of 4 in three buffers
    assert found(may_overlap=True, tokens=6) == (1, False)
    assert found(may_overlap=True, chunk_tokens=6) == (2, True)


def test_rows_of_logits_start_at_multiples_of_16_bytes():
    hidden, weight = (
        random_logits(5, 4, seed=0, dtype=torch.bfloat16),
        random_logits(19, 4, seed=1, dtype=torch.bfloat16),
    )
    head = ChunkedHead(hidden, OutputHead(weight), 17, [slice(0, 3), slice(3, 5)], buffers=2)
    first, second = head.logits(slice(0, 3)), head.logits(slice(3, 5))
    for logits, chunk in ((first, slice(0, 3)), (second, slice(3, 5))):
        assert logits.stride() == (24, 1)
        torch.testing.assert_close(logits, hidden[chunk] @ weight[:17].t())
    assert head.logits(slice(0, 3)).data_ptr() == first.data_ptr() != second.data_ptr()


def events_of_one_call(rank, world_size, tokens, beta):
    """The collectives and the products of gradients of one call with chunks of 5 tokens, in order."""
    hidden, weight = random_logits(tokens, 4, seed=0).requires_grad_(), random_logits(8, 4, seed=1).requires_grad_()
    teacher = LinearHead(random_logits(tokens, 4, seed=2), OutputHead(random_logits(8, 4, seed=3)))
    events, original, run_next = [], dist.all_gather_into_tensor, DeferredProducts.run_next

    class Work:
        def __init__(self, work):
            self.work = work

        def wait(self):
            events.append("wait")
            self.work.wait()

    def gather(*args, async_op=False, **kwargs):
        events.append("gather")
        work = original(*args, async_op=async_op, **kwargs)
        return Work(work) if async_op else work

    def run(self):
        events.extend(["product"] * bool(self))
        run_next(self)

    dist.all_gather_into_tensor, DeferredProducts.run_next = gather, run
    try:
        targets = TokenTargets(torch.ones(tokens), torch.arange(tokens))
        spec = DivergenceSpec(beta, group=dist.group.WORLD)
        student = LinearHead(hidden, OutputHead(weight))
        fused_linear_divergence(student, teacher, targets, spec, options=FusedLinearOptions(5))
    finally:
        dist.all_gather_into_tensor, DeferredProducts.run_next = original, run_next
    return events


def test_products_run_while_the_next_chunks_collectives_are_under_way(gloo_world):
    first = ["gather", "wait"]
    during = ["gather", "product", "wait"]
    for events in gloo_world(2).run(events_of_one_call, 15, 0.5):
        assert events == [*first * 2, *during * 4, "product", "product"]
    for events in gloo_world(2).run(events_of_one_call, 10, 0.0):
        assert events == [*first, *during, "product", "product", "product"]
    for events in gloo_world(2).run(events_of_one_call, 5, 0.5):
        assert events == ["gather", "gather", "product", "product"]  # one chunk has nothing to wait for


def total_on_an_uneven_vocabulary(rank, world_size, budget):
    """Of heads whose last rank has one valid column of 8, in chunks of the default size."""
    before, chunking.CPU_LOGITS_BYTES = chunking.CPU_LOGITS_BYTES, budget
    try:
        hidden, teacher_hidden = (random_logits(12, 4, seed=seed) for seed in (0, 1))
        own = slice(8 * rank, 8 * rank + 8)
        student, teacher = (OutputHead(random_logits(16, 4, seed=seed)[own]) for seed in (2, 3))
        spec = DivergenceSpec(0.5, vocab_size=9, group=dist.group.WORLD)
        targets = TokenTargets(torch.ones(12))
        return fused_linear_divergence(
            LinearHead(hidden.requires_grad_(), student), LinearHead(teacher_hidden, teacher), targets, spec
        )[0].item()
    finally:
        chunking.CPU_LOGITS_BYTES = before


def test_all_ranks_have_the_same_chunks(gloo_world):
    """However few columns of theirs are in the true vocabulary: the collectives of a chunk need all ranks."""
    whole, in_chunks = (gloo_world(2).run(total_on_an_uneven_vocabulary, size) for size in (1 << 30, 6 * 8 * 4 * 2))
    assert whole + in_chunks == pytest.approx(4 * whole[:1])


@pytest.mark.cpu
@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "bf16"), (torch.float16, "fp16")])
@pytest.mark.parametrize("allowed", [True, False])
def test_long_sums_are_in_full_precision_on_a_gpu(dtype, kind, allowed):
    settings, name = torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"
    before, seen = getattr(settings, name), []
    on_gpu = types.SimpleNamespace(dtype=dtype, device=torch.device("cuda"))

    def read_and_fail():
        seen.append(getattr(settings, name))
        raise ZeroDivisionError

    setattr(settings, name, allowed)
    try:
        with pytest.raises(ZeroDivisionError), _full_precision_sums(on_gpu):
            read_and_fail()
        assert seen == [False]
        assert getattr(settings, name) is allowed
        with _full_precision_sums(torch.zeros(1, dtype=dtype)):
            assert getattr(settings, name) is allowed
    finally:
        setattr(settings, name, before)
    a, b = (random_logits(6, 6, seed=seed, dtype=dtype) for seed in (0, 1))
    out = torch.empty_like(a)
    multiply_in_full_precision(a, b, out)
    assert torch.equal(out, a @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_chunk_overwrites_the_buffer_and_padding_is_zero(dtype, monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, torch.nan, **options))
    weight = torch.zeros(7, 3, dtype=dtype)
    gradient = HeadGradient.from_weight(weight, is_final=False)
    a, b = random_logits(4, 5, seed=0, dtype=dtype), random_logits(4, 3, seed=1, dtype=dtype)
    for _ in range(2):
        gradient.add(a, b)
    gradient.complete()
    torch.testing.assert_close(gradient.buffer[:5], 2 * a.float().t() @ b.float(), rtol=1e-5, atol=1e-5)
    assert (gradient.buffer[5:] == 0).all()
    unused = HeadGradient.from_weight(weight, is_final=False)
    unused.complete()
    assert (unused.buffer == 0).all()
    scaled = gradient.finish(gradient.buffer, torch.tensor(3.0))
    assert scaled.dtype == dtype
    torch.testing.assert_close(scaled, (3 * gradient.buffer).to(dtype))


@pytest.mark.parametrize("factor", [None, 3.0])
def test_a_main_grad_that_comes_after_forward_gets_the_gradient(factor):
    weight = torch.zeros(2, 3)
    gradient = HeadGradient.from_weight(weight, is_final=factor is None)
    gradient.add(torch.ones(4, 2), torch.ones(4, 3))
    weight.main_grad = torch.ones(2, 3)
    gradient.finish(gradient.buffer, None if factor is None else torch.tensor(factor))
    assert (weight.main_grad == 1 + 4 * (factor or 1)).all() and weight.grad_added_to_main_grad

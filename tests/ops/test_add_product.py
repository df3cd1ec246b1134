"""Products are added in the wider dtype, by the fastest method that torch has on the device."""

import pytest
import torch
from ops.oracle import random_logits, relative_error

from megatron_gkd.ops import add_product as module
from megatron_gkd.ops.add_product import add_product
from megatron_gkd.ops.head_gradient import HeadGradient


@pytest.fixture(autouse=True)
def probe_again():
    module._method.cache_clear()
    yield
    module._method.cache_clear()


def operands(dtype):
    return random_logits(50, 33, seed=0, dtype=dtype).t(), random_logits(50, 21, seed=1, dtype=dtype)


def as_torch_2_13(original, calls):
    """Compute as `torch.addmm` and `torch.mm` do on CUDA where they take `out_dtype` and an fp32 matrix to add to."""

    def product(*matrices, out_dtype, out=None, beta=1):
        calls.append(original.__name__)
        *added, a, b = matrices
        found = (a.double() @ b.double() + sum(beta * x.double() for x in added)).to(out_dtype)
        return found if out is None else out.copy_(found)

    return product


def refuse_fp32(self, mat1, mat2, *, beta, out_dtype, out):
    """Raise what `torch.addmm` raises in torch 2.8 and 2.9."""
    raise RuntimeError("self and mat2 must have the same dtype, but got Float and BFloat16")


def know_no_out_dtype(*matrices, **options):
    raise TypeError("mm() got an unexpected keyword argument 'out_dtype'")


def round_the_product(self, mat1, mat2, *, beta, out_dtype, out):
    return out.add_(mat1 @ mat2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_bytes", [module.BLOCK_BYTES, 5 * 21 * 4, 1])
def test_the_sum_is_that_of_the_wider_type(dtype, block_bytes, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", block_bytes)
    a, b = operands(dtype)
    target = torch.full((33, 21), 0.5)
    add_product(target, a, b)
    assert relative_error(target, a.double() @ b.double() + 0.5) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_head_is_not_rounded_between_chunks(dtype):
    logits_gradient, hidden = random_logits(50, 33, seed=0, dtype=dtype), random_logits(50, 21, seed=1, dtype=dtype)
    gradient = HeadGradient.from_weight(torch.empty(33, 21, dtype=dtype), is_final=False)
    for chunk in (slice(20), slice(20, 50)):
        gradient.add(logits_gradient[chunk], hidden[chunk])
    assert relative_error(gradient.buffer, logits_gradient.double().t() @ hidden.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operands_of_the_targets_own_type(dtype):
    a, b = operands(dtype)
    target = torch.ones(33, 21, dtype=dtype)
    add_product(target, a, b)
    assert relative_error(target, a.double() @ b.double() + 1) < 1e-6


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("addmm", "mm", "method"),
    [
        (as_torch_2_13, as_torch_2_13, module._by_addmm),
        (refuse_fp32, as_torch_2_13, module._by_mm),
        (round_the_product, as_torch_2_13, module._by_mm),
        (know_no_out_dtype, know_no_out_dtype, module._by_casting),
    ],
)
def test_the_first_exact_method_is_used(addmm, mm, method, monkeypatch):
    calls = []
    for name, replacement in (("addmm", addmm), ("mm", mm)):
        if replacement is as_torch_2_13:
            replacement = replacement(getattr(torch, name), calls)
        monkeypatch.setattr(torch, name, replacement)
    a, b = operands(torch.bfloat16)
    for _ in range(2):
        target = torch.full((33, 21), 0.5)
        add_product(target, a, b)
        assert relative_error(target, a.double() @ b.double() + 0.5) < 1e-6
    assert module._method(a.device, a.dtype, target.dtype) is method
    assert len(calls) == {module._by_addmm: 3, module._by_mm: 3, module._by_casting: 0}[method]  # one is the probe


@pytest.mark.cpu
def test_a_device_without_memory_is_not_taken_for_a_refusal(monkeypatch):
    def no_memory(*matrices, **options):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(torch, "addmm", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        add_product(torch.zeros(33, 21), *operands(torch.bfloat16))

"""Matrix products that are added to a tensor of a wider dtype, without rounding to the operands' dtype in between.

The methods differ in speed and memory, and in the versions of torch that have them: ``torch.addmm`` with `out_dtype`
came with 2.8, for CUDA only, and before 2.10 it rejects an fp32 matrix to add to. So each method is tried on a small
problem, once for each device and pair of dtypes, and the first one with an exact result is used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Where a product needs a temporary, it is computed in blocks of rows whose temporary has at most this size.
BLOCK_BYTES = 64 << 20


def add_product(target: Tensor, a: Tensor, b: Tensor, *, overwrite: bool = False) -> None:
    """Compute target += a @ b in place, in the dtype of `target`.

    Args:
        target: [M, N] of the operands' dtype, or of a wider one.
        a: [M, K].
        b: [K, N] of the same dtype as `a`.
        overwrite: compute target = a @ b instead, whatever `target` holds.
    """
    beta = 0 if overwrite else 1
    if target.dtype == a.dtype:
        target.addmm_(a, b, beta=beta)
    else:
        _method(a.device, a.dtype, target.dtype)(target, a, b, beta)


def _by_addmm(target: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    torch.addmm(target, a, b, beta=beta, out_dtype=target.dtype, out=target)


def _by_mm(target: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    for rows in _row_blocks(target):
        if beta == 0:
            torch.mm(a[rows], b, out_dtype=target.dtype, out=target[rows])
        else:
            target[rows] += torch.mm(a[rows], b, out_dtype=target.dtype)


def _by_casting(target: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    b = b.to(target.dtype)
    for rows in _row_blocks(target):
        target[rows].addmm_(a[rows].to(target.dtype), b, beta=beta)


def multiply_in_full_precision(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Compute out = a @ b, with fp32 partial sums where a GPU splits a long sum of 16-bit products.

    By default torch allows such partial sums to be rounded to 16 bits.
    """
    with _full_precision_sums(a):
        torch.mm(a, b, out=out)


@contextlib.contextmanager
def _full_precision_sums(operand: Tensor) -> Iterator[None]:
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(operand.dtype)
    if kind is None or operand.device.type != "cuda":
        yield
        return
    settings, name = torch.backends.cuda.matmul, f"allow_{kind}_reduced_precision_reduction"
    allowed, may_split = getattr(settings, name), getattr(settings, f"{name}_split_k", None)

    def allow(value: bool) -> None:
        setattr(settings, name, value if may_split is None else (value, may_split))  # before torch 2.10 just a bool

    allow(False)
    try:
        yield
    finally:
        allow(allowed)


def _row_blocks(target: Tensor) -> Iterator[slice]:
    rows, columns = target.shape
    step = max(1, BLOCK_BYTES // max(1, columns * target.element_size()))
    return (slice(start, start + step) for start in range(0, rows, step))


Method = Callable[[Tensor, Tensor, Tensor, int], None]

_METHODS = (_by_addmm, _by_mm, _by_casting)  # the fastest one first


@functools.cache
def _method(device: torch.device, operands: torch.dtype, target: torch.dtype) -> Method:
    """Return the first of ``_METHODS`` that gives the exact result on `device`."""
    return next((method for method in _METHODS[:-1] if _is_exact(method, device, operands, target)), _METHODS[-1])


def _is_exact(method: Method, device: torch.device, operands: torch.dtype, target: torch.dtype) -> bool:
    """Return whether `method` runs and rounds no product: 1 + 16 x² is exact in fp32 here, but in no 16-bit dtype."""
    x = 1 + 2.0**-7
    a, b = (torch.full((16, 16), x, dtype=operands, device=device) for _ in range(2))
    found = torch.ones(16, 16, dtype=target, device=device)
    try:
        method(found, a.t(), b, 1)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError):  # rejected, not implemented for this device, or without `out_dtype`
        return False
    return bool((found == 1 + 16 * x * x).all())

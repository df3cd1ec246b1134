"""What all loss tests share: seeded logits, the unsharded fp64 oracle, and errors measured against it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gkd.ops import reference

BETAS = [0.0, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1.0]
TEMPERATURES = [0.5, 1.0, 2.0]


def random_logits(*shape: int, seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def oracle(student: Tensor, teacher: Tensor, upstream: Tensor, dtype=torch.float64, **options) -> tuple[Tensor, Tensor]:
    """(D [...], gradient [..., V] of sum(upstream * D)) by autograd through the reference, computed in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    per_token = reference.divergence(student, teacher.to(dtype), **options)
    per_token.backward(upstream.to(dtype))
    return per_token.detach(), student.grad


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in fp64; what is expected below 1e-6 is as good as 0."""
    difference = (actual.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), 1e-6)


def shard(x: Tensor, rank: int, ranks: int) -> Tensor:
    """The rank's columns, as a tensor of its own."""
    return x.chunk(ranks, -1)[rank].clone()


def pad_columns(x: Tensor, columns: int, seed: int = 99) -> Tensor:
    """Append columns of ordinary numbers, which must not count."""
    padding = random_logits(*x.shape[:-1], columns, seed=seed, scale=5.0, dtype=x.dtype)
    return torch.cat([x, padding], -1)

"""Seeded logits, the unsharded fp64 oracle, errors measured against it, and the ops called with plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gkd.ops import (
    DivergenceSpec,
    reference,
    topk_divergence,
    vocab_parallel_divergence,
    vocab_parallel_divergence_with_statistics,
)

BETAS = [0.0, 1e-4, 0.1, 0.5, 0.9, 1 - 1e-4, 1.0]
TEMPERATURES = [0.5, 1.0, 2.0]


def _points() -> list[tuple[str, float]]:
    """(family, beta): every divergence, at every beta that makes a difference to it."""
    points = []
    for name, family in reference.FAMILIES.items():
        if family.at_0 == family.between == family.at_1:
            points.append((name, 0.5))
        else:
            points += [(name, beta) for beta in BETAS if family.at(beta)]
    return points


POINTS = _points()
# Betas at which terms are as small as the error of a fast logarithm.
NEAR_THE_ENDS = [
    (name, beta)
    for name in ("jsd", "skewed_forward_kl", "skewed_reverse_kl", "alpha")
    for beta in (1e-6, 1e-5, 1e-3, 1 - 1e-3, 1 - 1e-5, 1 - 1e-6)
]
MIDDLES = [(name, 0.5) for name in reference.FAMILIES]


def random_logits(*shape: int, seed: int, scale: float = 3.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
    return (numbers * scale).to(torch.get_default_device(), dtype)


def divergence_of(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, **spec) -> Tensor:
    """``vocab_parallel_divergence`` with the fields of its specification as keywords."""
    return vocab_parallel_divergence(student, teacher, DivergenceSpec(**spec), mask=mask)


def statistics_of(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, **spec):
    """The statistics of ``vocab_parallel_divergence_with_statistics``."""
    return vocab_parallel_divergence_with_statistics(student, teacher, DivergenceSpec(**spec), mask=mask)[1]


def topk_divergence_of(student: Tensor, topk, *, tail_mode="renormalize", mask: Tensor | None = None, **spec) -> Tensor:
    """``topk_divergence`` with the fields of its specification as keywords."""
    return topk_divergence(student, topk, DivergenceSpec(**spec), tail_mode=tail_mode, mask=mask)


def oracle(
    student: Tensor, teacher: Tensor, upstream: Tensor, dtype=torch.float64, mask: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """(D [...], gradient [..., V] of sum(upstream * D)) by autograd through the reference, computed in `dtype`."""
    student = student.detach().to(dtype).requires_grad_()
    per_token = reference.divergence(student, teacher.to(dtype), **options)
    if mask is not None:
        per_token = torch.where(mask, per_token, 0)
    per_token.backward(upstream.to(dtype))
    return per_token.detach(), student.grad


def relative_error(actual: Tensor, expected: Tensor, scale: float = 1e-6) -> float:
    """|actual - expected| / |expected| in the Euclidean norm, in fp64; relative to `scale` where that is larger.

    The scale for gradients of nearly one-hot rows, which are small differences of probabilities near 1, is that of the
    probabilities.
    """
    difference = (actual.double() - expected.double()).norm().item()
    return difference / max(expected.double().norm().item(), scale)


def tolerance(dtype: torch.dtype, own_error: float) -> float:
    """What a loss or gradient may be off by: 1e-5, or little more than the reference in fp32 is."""
    return 1e-9 if dtype == torch.float64 else max(1e-5, 1.5 * own_error)


def rounding(dtype: torch.dtype) -> float:
    """What storing a gradient in `dtype` costs, relatively."""
    return 2.0**-8 if dtype in (torch.bfloat16, torch.float16) else 0.0


def shard(x: Tensor, rank: int, ranks: int) -> Tensor:
    """The rank's columns, as a tensor of its own."""
    return x.chunk(ranks, -1)[rank].clone()


def pad_columns(x: Tensor, columns: int, seed: int = 99) -> Tensor:
    """Append columns of ordinary numbers, which must not count."""
    padding = random_logits(*x.shape[:-1], columns, seed=seed, scale=5.0, dtype=x.dtype)
    return torch.cat([x, padding], -1)

"""The divergences of ``reference`` at one vocabulary entry, written for low precision.

`terms(a, b, p, q)` returns (value, slope) elementwise. Sums over the vocabulary only have to be right as sums, which
leaves two freedoms, used here so that equal distributions give exactly 0 and rounding never makes a divergence
negative: to the value any multiple of q - p may be added, and to the slope any multiple of p
(see ``reference.Divergence``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FAR = 60.0  # e^60 fits fp32, and 1 is nothing beside it


class Pointwise(Protocol):
    """One divergence. All tensors have one shape and float type; p = exp a is the student, q = exp b the teacher."""

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]: ...


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """b - a, and 0 where both are -inf."""
    return torch.where(a == b, 0, b - a)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 where the weight is 0 and x perhaps infinite. NaN stays NaN."""
    return torch.where(weight == 0, 0, weight * x)


def _log_mix(x: Tensor, w: float) -> Tensor:
    """ln(1 - w + w e^x), accurate for any x and for w near 0 and 1."""
    near = torch.log1p(w * torch.expm1(x.clamp(max=_FAR)))
    if w > 0.5:  # 1 - w would be lost beside 1
        near = torch.where(x < -0.5, torch.log(1 - w + w * x.exp()), near)
    return torch.where(x > _FAR, x + math.log(w), near)


@dataclass(frozen=True)
class GeneralizedJSD:
    """beta KL(T||M) + (1 - beta) KL(S||M) with the mixture m = beta q + (1 - beta) p, for 0 < beta < 1."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        beta, ratio = self.beta, _log_ratio(a, b)
        student = weighted(p, -_log_mix(ratio, beta))  # p (a - ln m)
        teacher = weighted(q, -_log_mix(-ratio, 1 - beta))  # q (b - ln m)
        slope = (1 - beta) * student
        return (beta * teacher + slope).clamp(min=0), slope  # >= 0 at each entry, by the log-sum inequality


@dataclass(frozen=True)
class ForwardKL:
    """KL(T||S), the branch at beta = 0. Infinite where the student excludes what the teacher allows."""

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        difference = p - q
        return (weighted(q, _log_ratio(a, b)) + difference).clamp(min=0), difference


@dataclass(frozen=True)
class ReverseKL:
    """KL(S||T), the branch at beta = 1. Infinite where the teacher excludes what the student allows."""

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        slope = weighted(p, -_log_ratio(a, b))
        return (slope - (p - q)).clamp(min=0), slope


def pointwise_divergence(beta: float) -> Pointwise:
    """The divergence at `beta`; the ends are their own branches, by exact equality. ValueError outside [0, 1]."""
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; allowed are values from 0 to 1")
    return {0.0: ForwardKL(), 1.0: ReverseKL()}.get(beta) or GeneralizedJSD(beta)

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

from megatron_gkd.ops.reference import Divergence, divergence_at

_FAR = 60.0  # e^60 fits fp32, and 1 is nothing beside it


class Pointwise(Protocol):
    """One divergence. All tensors have one shape and float type; p = exp a is the student, q = exp b the teacher."""

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]: ...


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """B - a, and 0 where both are -inf."""
    return torch.where(a == b, 0, b - a)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Weight * x, and 0 where the weight is 0 and x perhaps infinite. NaN stays NaN."""
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
    """KL(T||S). Infinite where the student excludes what the teacher allows."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        difference = p - q
        return (weighted(q, _log_ratio(a, b)) + difference).clamp(min=0), difference


@dataclass(frozen=True)
class ReverseKL:
    """KL(S||T). Infinite where the teacher excludes what the student allows."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        slope = weighted(p, -_log_ratio(a, b))
        return (slope - (p - q)).clamp(min=0), slope


@dataclass(frozen=True)
class TotalVariation:
    """Half the sum of |p - q|, with slope 0 where they are equal."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        return (p - q).abs() / 2, -p * _log_ratio(a, b).sign() / 2


def _share(x: Tensor, p: Tensor, mixture: Tensor) -> Tensor:
    """X p / M, and 0 where nothing is mixed."""
    return x * p / torch.where(mixture > 0, mixture, 1)


@dataclass(frozen=True)
class SkewedForwardKL:
    """KL(T||M), for 0 < beta < 1."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        beta, excess = self.beta, p - q
        teacher = weighted(q, -_log_mix(-_log_ratio(a, b), 1 - beta))
        slope = (1 - beta) ** 2 * _share(excess, p, beta * q + (1 - beta) * p)
        return (teacher + (1 - beta) * excess).clamp(min=0), slope


@dataclass(frozen=True)
class SkewedReverseKL:
    """KL(S||M), for 0 < beta < 1."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        beta, excess = self.beta, p - q
        student = weighted(p, -_log_mix(_log_ratio(a, b), beta))
        slope = student - beta * (1 - beta) * _share(excess, p, beta * q + (1 - beta) * p)
        return (student - beta * excess).clamp(min=0), slope


@dataclass(frozen=True)
class Alpha:
    """(1 - sum p^beta q^(1 - beta)) / (beta (1 - beta)), for 0 < beta < 1."""

    beta: float

    def terms(self, a: Tensor, b: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        beta, ratio = self.beta, _log_ratio(a, b)
        teacher_is_higher = ratio > 0
        gap, higher = -ratio.abs(), torch.maximum(p, q)
        difference = torch.expm1(gap)  # lower / higher - 1
        # p^beta q^(1 - beta) is higher · e^(exponent · gap), with the exponent of the lower one. Where that is above
        # 1/2 one factor of the ratio is taken out: x stays small, since the scales are large where beta is near 0 or 1.
        for_teacher, for_student = (exponent - (exponent > 0.5) for exponent in (beta, 1 - beta))
        x = torch.where(teacher_is_higher, gap.new_tensor(for_teacher), gap.new_tensor(for_student))
        taken_out = x < 0
        power = torch.where(taken_out, difference + 1, 1) * torch.expm1((x * gap).clamp(max=_FAR))
        mean = torch.where(taken_out, power + difference, power)  # the geometric mean / higher - 1
        of_teacher = torch.where(taken_out, -power, difference - power)
        value = higher * (x * difference - power) / (beta * (1 - beta))
        return value.clamp(min=0), higher * torch.where(teacher_is_higher, of_teacher, -mean) / (1 - beta)


_POINTWISE = {
    "generalized_jsd": GeneralizedJSD,
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "total_variation": TotalVariation,
    "skewed_forward_kl": SkewedForwardKL,
    "skewed_reverse_kl": SkewedReverseKL,
    "alpha": Alpha,
}


def pointwise(divergence: Divergence, beta: float) -> Pointwise:
    """The low-precision form of a row of ``reference``."""
    return _POINTWISE[divergence.name](beta)


def pointwise_divergence(beta: float, family: str = "jsd") -> Pointwise:
    """Likewise by name. ValueError as from ``reference.divergence_at``."""
    return pointwise(divergence_at(beta, family), beta)

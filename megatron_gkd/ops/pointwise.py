"""The divergences of ``reference`` at one vocabulary entry, written for low precision.

Notation as in ``reference``. Sums over the vocabulary only have to be right as sums, which leaves two freedoms: any
multiple of q - p may be added to a value, and any multiple of p to a slope. Here they are used so that equal
distributions give exactly 0 and rounding never makes a divergence negative.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_gkd.ops import reference

_FAR = 60.0  # e^60 is finite in fp32, and adding 1 to it changes nothing

Terms = Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(a, b, p, q, beta) -> (value, slope), elementwise, of log-probabilities a and b and their exponentials p and q."""

_TERMS: dict[str, Terms] = {}


def _computes(divergence: reference.Divergence) -> Callable[[Terms], Terms]:
    """Register a function as the low-precision form of `divergence`."""

    def register(terms: Terms) -> Terms:
        _TERMS[divergence.name] = terms
        return terms

    return register


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return b - a, and 0 where both are -inf."""
    return torch.where(a == b, 0, b - a)


def weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight * x, and 0 where the weight is 0, even if x is infinite."""
    return torch.where(weight == 0, 0, weight * x)


def _log_mix(x: Tensor, w: float) -> Tensor:
    """Return ln(1 - w + w e^x), accurate for any x and for w near 0 and 1."""
    near = torch.log1p(w * torch.expm1(x.clamp(max=_FAR)))
    if w > 0.5:  # 1 - w would be lost beside 1
        near = torch.where(x < -0.5, torch.log(1 - w + w * x.exp()), near)
    return torch.where(x > _FAR, x + math.log(w), near)


@_computes(reference.GENERALIZED_JSD)
def _generalized_jsd(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute beta KL(T||M) + (1 - beta) KL(S||M), for 0 < beta < 1."""
    ratio = _log_ratio(a, b)
    student = weighted(p, -_log_mix(ratio, beta))  # p (a - ln m)
    teacher = weighted(q, -_log_mix(-ratio, 1 - beta))  # q (b - ln m)
    slope = (1 - beta) * student
    return (beta * teacher + slope).clamp(min=0), slope  # >= 0 at each entry, by the log-sum inequality


@_computes(reference.FORWARD_KL)
def _forward_kl(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(T||S): infinite where the student excludes what the teacher allows."""
    difference = p - q
    return (weighted(q, _log_ratio(a, b)) + difference).clamp(min=0), difference


@_computes(reference.REVERSE_KL)
def _reverse_kl(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(S||T): infinite where the teacher excludes what the student allows."""
    slope = weighted(p, -_log_ratio(a, b))
    return (slope - (p - q)).clamp(min=0), slope


@_computes(reference.TOTAL_VARIATION)
def _total_variation(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute half the sum of |p - q|, with slope 0 where they are equal."""
    return (p - q).abs() / 2, -p * _log_ratio(a, b).sign() / 2


def _share(x: Tensor, p: Tensor, mixture: Tensor) -> Tensor:
    """Return x p / mixture, and 0 where the mixture is 0."""
    return x * p / torch.where(mixture > 0, mixture, 1)


@_computes(reference.SKEWED_FORWARD_KL)
def _skewed_forward_kl(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(T||M), for 0 < beta < 1."""
    excess = p - q
    teacher = weighted(q, -_log_mix(-_log_ratio(a, b), 1 - beta))
    slope = (1 - beta) ** 2 * _share(excess, p, beta * q + (1 - beta) * p)
    return (teacher + (1 - beta) * excess).clamp(min=0), slope


@_computes(reference.SKEWED_REVERSE_KL)
def _skewed_reverse_kl(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute KL(S||M), for 0 < beta < 1."""
    excess = p - q
    student = weighted(p, -_log_mix(_log_ratio(a, b), beta))
    slope = student - beta * (1 - beta) * _share(excess, p, beta * q + (1 - beta) * p)
    return (student - beta * excess).clamp(min=0), slope


@_computes(reference.ALPHA)
def _alpha(a: Tensor, b: Tensor, p: Tensor, q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Compute (1 - sum p^beta q^(1 - beta)) / (beta (1 - beta)), for 0 < beta < 1."""
    ratio = _log_ratio(a, b)
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


def pointwise(divergence: reference.Divergence) -> Terms:
    """Return the low-precision form of a divergence of ``reference``."""
    return _TERMS[divergence.name]


def softcap_slope(logits: Tensor, cap: float) -> Tensor:
    """Return dy/dz at logits y = cap tanh(z / cap), >= 0."""
    return (1 - (logits / cap).square()).clamp(min=0)

"""The divergences in plain differentiable torch, unsharded: every faster implementation is tested against them.

Notation: log-probabilities a (student S) and b (teacher T), probabilities p = exp a and q = exp b, and the mixture
M = beta T + (1 - beta) S. Each divergence is a pair of functions of one vocabulary entry: its value, to be summed over
the vocabulary, and the slope of that value. In fp64 they are the oracle of the tests. A logit of -inf is an entry of
probability zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.config.divergences import FAMILIES


@dataclass(frozen=True)
class Divergence:
    """Define a divergence that is a sum over the vocabulary: D = sum_j value(a_j, b_j, beta).

    Attributes:
        name: the name that ``config.divergences.FAMILIES``, ``ops.pointwise`` and the kernels use.
        value: (a, b, beta) -> value, elementwise.
        slope: (a, b, beta) -> ∂value/∂a, elementwise, up to a multiple of p, which cancels in the gradient by the
            student's logits z: ∂D/∂z_j = (slope_j - p_j sum_u slope_u) / temperature.
    """

    name: str
    value: Callable[[Tensor, Tensor, float], Tensor]
    slope: Callable[[Tensor, Tensor, float], Tensor]


def _safe_log(x: Tensor) -> Tensor:
    """Return ln x, and 0 with zero gradient at x = 0."""
    return torch.where(x > 0, x, 1).log()


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Return weight * x, and 0 with zero gradient where the weight is 0, even if x is infinite."""
    return weight * torch.where(weight > 0, x, 0)


def _jsd_value(a: Tensor, b: Tensor, beta: float) -> Tensor:
    p, q = a.exp(), b.exp()
    log_m = _safe_log(beta * q + (1 - beta) * p)
    return beta * _weighted(q, b - log_m) + (1 - beta) * _weighted(p, a - log_m)


def _jsd_slope(a: Tensor, b: Tensor, beta: float) -> Tensor:
    p, q = a.exp(), b.exp()
    return (1 - beta) * _weighted(p, a - _safe_log(beta * q + (1 - beta) * p))


def _skewed_slope(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Return p q / M, and 0 where both are 0."""
    p, q = a.exp(), b.exp()
    mixture = beta * q + (1 - beta) * p
    return p * q / torch.where(mixture > 0, mixture, 1)


def _geometric_mean(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """Return p^beta q^(1 - beta)."""
    return (beta * a + (1 - beta) * b).exp()


GENERALIZED_JSD = Divergence("generalized_jsd", _jsd_value, _jsd_slope)
FORWARD_KL = Divergence(
    "forward_kl",
    value=lambda a, b, beta: _weighted(b.exp(), b - a),
    slope=lambda a, b, beta: -b.exp(),
)
REVERSE_KL = Divergence(
    "reverse_kl",
    value=lambda a, b, beta: _weighted(a.exp(), a - b),
    slope=lambda a, b, beta: _weighted(a.exp(), a - b),
)
TOTAL_VARIATION = Divergence(
    "total_variation",
    value=lambda a, b, beta: (a.exp() - b.exp()).abs() / 2,
    slope=lambda a, b, beta: a.exp() * (a - b).sign() / 2,
)
SKEWED_FORWARD_KL = Divergence(
    "skewed_forward_kl",
    value=lambda a, b, beta: _weighted(b.exp(), b - _safe_log(beta * b.exp() + (1 - beta) * a.exp())),
    slope=lambda a, b, beta: -(1 - beta) * _skewed_slope(a, b, beta),
)
SKEWED_REVERSE_KL = Divergence(
    "skewed_reverse_kl",
    value=lambda a, b, beta: _weighted(a.exp(), a - _safe_log(beta * b.exp() + (1 - beta) * a.exp())),
    slope=lambda a, b, beta: (
        _weighted(a.exp(), a - _safe_log(beta * b.exp() + (1 - beta) * a.exp())) + beta * _skewed_slope(a, b, beta)
    ),
)
ALPHA = Divergence(
    "alpha",
    value=lambda a, b, beta: (
        ((1 - beta) * b.exp() + beta * a.exp() - _geometric_mean(a, b, beta)) / (beta * (1 - beta))
    ),
    slope=lambda a, b, beta: -_geometric_mean(a, b, beta) / (1 - beta),
)


DIVERGENCES = {
    divergence.name: divergence
    for divergence in (
        GENERALIZED_JSD,
        FORWARD_KL,
        REVERSE_KL,
        TOTAL_VARIATION,
        SKEWED_FORWARD_KL,
        SKEWED_REVERSE_KL,
        ALPHA,
    )
}


def divergence_at(beta: float, name: str = "jsd") -> Divergence:
    """Return the divergence of the family `name` at `beta`; the ends of beta are taken by exact equality.

    Raises:
        ValueError: the family is unknown, or does not allow this beta.
    """
    if name not in FAMILIES:
        raise ValueError(f"divergence = {name!r}: must be one of {', '.join(FAMILIES)}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta = {beta}: must be from 0 to 1")
    found = FAMILIES[name].at(beta)
    if found is None:
        raise ValueError(f"beta = {beta}: must be {FAMILIES[name].allowed} with divergence = {name}")
    return DIVERGENCES[found]


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    divergence: str = "jsd",
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """Return the divergence of each token, [...], in the inputs' dtype; the teacher gets no gradient.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V].
        beta: the teacher's weight in the mixture.
        divergence: a name of ``config.divergences.FAMILIES``.
        temperature: divides both models' logits.
        vocab_size: columns from here on do not count; None if all count.
    """
    a = (student_logits[..., :vocab_size] / temperature).log_softmax(-1)
    b = (teacher_logits[..., :vocab_size].detach() / temperature).log_softmax(-1)
    return divergence_at(beta, divergence).value(a, b, beta).sum(-1)


def entropy(logits: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Return the entropy in nats, [...], of the distributions of logits [..., V] at `temperature`."""
    a = (logits[..., :vocab_size] / temperature).log_softmax(-1)
    return -_weighted(a.exp(), a).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """Return -ln p(label) at temperature 1, [...], of logits [..., V]; 0 where the label is -100."""
    a = logits[..., :vocab_size].log_softmax(-1)
    chosen = a.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0, -chosen)


def logits(
    hidden: Tensor, weight: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """Return the logits [..., V] of hidden states [..., H] and a head [V, H]: cap tanh(scale (h W^T + b) / cap)."""
    product = hidden @ weight.t()
    z = scale * (product if bias is None else product + bias)
    return z if softcap is None else softcap * (z / softcap).tanh()

"""The divergences in plain differentiable torch, unsharded: what every faster implementation is tested against.

Log-probabilities are called a (student S) and b (teacher T), probabilities p = exp a and q = exp b, and the mixture is
M = beta T + (1 - beta) S. Each divergence is one row: its value at one vocabulary entry, to be summed over the
vocabulary, and the slope of that value. Give these functions fp64 and they are the oracle. Logits of -inf are legal:
their entries count as probability zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """A divergence that is a sum over the vocabulary: D = sum_j value(a_j, b_j, beta).

    `slope` is ∂value/∂a, up to a multiple of p that the softmax takes out again:
    ∂D/∂z_j = (slope_j - p_j sum_u slope_u) / temperature, for student logits z.
    """

    name: str
    value: Callable[[Tensor, Tensor, float], Tensor]
    slope: Callable[[Tensor, Tensor, float], Tensor]


def _safe_log(x: Tensor) -> Tensor:
    """Ln x, and 0 with zero gradient at x = 0."""
    return torch.where(x > 0, x, 1).log()


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """Weight * x, and 0 with zero gradient where the weight is 0 and x perhaps infinite."""
    return weight * torch.where(weight > 0, x, 0)


def _jsd_value(a: Tensor, b: Tensor, beta: float) -> Tensor:
    p, q = a.exp(), b.exp()
    log_m = _safe_log(beta * q + (1 - beta) * p)
    return beta * _weighted(q, b - log_m) + (1 - beta) * _weighted(p, a - log_m)


def _jsd_slope(a: Tensor, b: Tensor, beta: float) -> Tensor:
    p, q = a.exp(), b.exp()
    return (1 - beta) * _weighted(p, a - _safe_log(beta * q + (1 - beta) * p))


def _skewed_slope(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """P q / M, 0 where both are 0."""
    p, q = a.exp(), b.exp()
    mixture = beta * q + (1 - beta) * p
    return p * q / torch.where(mixture > 0, mixture, 1)


def _geometric_mean(a: Tensor, b: Tensor, beta: float) -> Tensor:
    """p^beta q^(1 - beta)."""
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


@dataclass(frozen=True)
class Family:
    """Divergences that one name stands for, as beta goes from 0 to 1; the ends may be rows of their own."""

    between: Divergence
    at_0: Divergence | None = None  # None: beta 0 is not allowed
    at_1: Divergence | None = None

    @property
    def allowed(self) -> str:
        lowest = "from 0" if self.at_0 else "above 0"
        return f"values {lowest} to 1" if self.at_1 else f"values {lowest} and below 1"


FAMILIES = {
    # beta KL(T||M) + (1 - beta) KL(S||M), which tends to 0 at both ends; the KL divergences stand there instead.
    # Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, eq. 1.
    "jsd": Family(GENERALIZED_JSD, at_0=FORWARD_KL, at_1=REVERSE_KL),
    # sum |p - q| / 2, whatever beta is. Wen et al. (f-distill), arXiv:2307.15190.
    "total_variation": Family(TOTAL_VARIATION, at_0=TOTAL_VARIATION, at_1=TOTAL_VARIATION),
    # KL(T||M) and KL(S||M). Ko et al. (DistiLLM), arXiv:2402.03898, section 3.1: their skew is beta for the first and
    # 1 - beta for the second, 0.1 by default.
    "skewed_forward_kl": Family(SKEWED_FORWARD_KL, at_0=FORWARD_KL),
    "skewed_reverse_kl": Family(SKEWED_REVERSE_KL, at_1=REVERSE_KL),
    # (1 - sum p^beta q^(1 - beta)) / (beta (1 - beta)), which tends to the KL divergences. Amari, "alpha-divergence is
    # unique, belonging to both f-divergence and Bregman divergence classes", IEEE Trans. Inf. Theory 55 (2009), with
    # alpha = 1 - beta; beta = 1/2 is four times the squared Hellinger distance.
    "alpha": Family(ALPHA, at_0=FORWARD_KL, at_1=REVERSE_KL),
}


def divergence_at(beta: float, family: str = "jsd") -> Divergence:
    """The row for `beta`; the ends are taken by exact equality.

    ValueError for an unknown family, and for a beta that it does not allow.
    """
    if family not in FAMILIES:
        raise ValueError(f"divergence is {family!r}; allowed are {', '.join(FAMILIES)}")
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"beta is {beta}; allowed are values from 0 to 1")
    members = FAMILIES[family]
    found = {0.0: members.at_0, 1.0: members.at_1}.get(beta, members.between)
    if found is None:
        raise ValueError(f"beta is {beta}; allowed with {family} are {members.allowed}")
    return found


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    divergence: str = "jsd",
    temperature: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """D per token, [...], in the inputs' type, from logits [..., V]; the teacher gets no gradient.

    Columns from `vocab_size` on do not count, and rows where `mask` [...] is False are 0.
    """
    a = (student_logits[..., :vocab_size] / temperature).log_softmax(-1)
    b = (teacher_logits[..., :vocab_size].detach() / temperature).log_softmax(-1)
    per_token = divergence_at(beta, divergence).value(a, b, beta).sum(-1)
    return per_token if mask is None else torch.where(mask, per_token, 0)


def entropy(logits: Tensor, *, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Entropy in nats, [...], of the tempered distributions of logits [..., V]."""
    a = (logits[..., :vocab_size] / temperature).log_softmax(-1)
    return -_weighted(a.exp(), a).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """-ln p(label) at temperature 1, [...]; 0 where the label is -100."""
    a = logits[..., :vocab_size].log_softmax(-1)
    chosen = a.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels == -100, 0, -chosen)

"""The divergences in plain differentiable torch, unsharded: what every faster implementation is tested against.

Log-probabilities are called a (student S) and b (teacher T), probabilities p = exp a and q = exp b. Each divergence is
one row: its value at one vocabulary entry, to be summed over the vocabulary, and the slope of that value. Give these
functions fp64 and they are the oracle. Logits of -inf are legal: their entries count as probability zero.

The family is the generalized Jensen-Shannon divergence of Agarwal et al., "On-Policy Distillation of Language Models"
(arXiv:2306.13649), equation 1, with the two Kullback-Leibler divergences in place of its vanishing limits.
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
    """ln x, and 0 with zero gradient at x = 0."""
    return torch.where(x > 0, x, 1).log()


def _weighted(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, and 0 with zero gradient where the weight is 0 and x perhaps infinite."""
    return weight * torch.where(weight > 0, x, 0)


def _jsd_value(a: Tensor, b: Tensor, beta: float) -> Tensor:
    p, q = a.exp(), b.exp()
    log_m = _safe_log(beta * q + (1 - beta) * p)
    return beta * _weighted(q, b - log_m) + (1 - beta) * _weighted(p, a - log_m)


def _jsd_slope(a: Tensor, b: Tensor, beta: float) -> Tensor:
    p, q = a.exp(), b.exp()
    return (1 - beta) * _weighted(p, a - _safe_log(beta * q + (1 - beta) * p))


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


def divergence_at(beta: float) -> Divergence:
    """KL(T||S) at exactly 0, KL(S||T) at exactly 1, the generalized JSD between (it tends to 0 at both ends)."""
    return {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(beta, GENERALIZED_JSD)


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """D per token, [...], in the inputs' type, from logits [..., V]; the teacher gets no gradient.

    Columns from `vocab_size` on do not count, and rows where `mask` [...] is False are 0.
    """
    a = (student_logits[..., :vocab_size] / temperature).log_softmax(-1)
    b = (teacher_logits[..., :vocab_size].detach() / temperature).log_softmax(-1)
    per_token = divergence_at(beta).value(a, b, beta).sum(-1)
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

"""The divergences that a recipe can name, declared once: the recipe's schema and ``megatron_gkd.ops`` both read this.

Notation: teacher T, student S, their mixture M = beta T + (1 - beta) S. ``ops/__init__.py`` lists what a new one needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DivergenceName = Literal["jsd", "total_variation", "skewed_forward_kl", "skewed_reverse_kl", "alpha"]


@dataclass(frozen=True)
class Family:
    """Declare which divergence one name stands for, as beta goes from 0 to 1.

    Attributes:
        between: the divergence for 0 < beta < 1, by its name in ``ops/reference.py``.
        at_0: the divergence at beta 0; None where beta 0 is not allowed.
        at_1: the divergence at beta 1; None where beta 1 is not allowed.
    """

    between: str
    at_0: str | None = None
    at_1: str | None = None

    def at(self, beta: float) -> str | None:
        """Return the divergence at `beta`, the ends taken by exact equality; None where `beta` is not allowed."""
        return {0.0: self.at_0, 1.0: self.at_1}.get(beta, self.between)

    @property
    def allowed(self) -> str:
        """Describe the allowed values of beta, as in "above 0"."""
        bounds = [] if self.at_0 else ["above 0"]
        return " and ".join(bounds if self.at_1 else [*bounds, "below 1"]) or "from 0 to 1"


FAMILIES: dict[str, Family] = {
    # beta KL(T||M) + (1 - beta) KL(S||M), which tends to 0 at both ends; the KL divergences take its place there.
    # Agarwal et al., "On-Policy Distillation of Language Models", arXiv:2306.13649, eq. 1.
    "jsd": Family("generalized_jsd", at_0="forward_kl", at_1="reverse_kl"),
    # sum |p - q| / 2, whatever beta is. Wen et al. (f-distill), arXiv:2307.15190.
    "total_variation": Family("total_variation", at_0="total_variation", at_1="total_variation"),
    # KL(T||M) and KL(S||M). Ko et al. (DistiLLM), arXiv:2402.03898, section 3.1: their skew is beta for the first and
    # 1 - beta for the second, 0.1 by default. Where M is the distribution itself, each is always 0 and not allowed.
    "skewed_forward_kl": Family("skewed_forward_kl", at_0="forward_kl"),
    "skewed_reverse_kl": Family("skewed_reverse_kl", at_1="reverse_kl"),
    # (1 - sum p^beta q^(1 - beta)) / (beta (1 - beta)), which tends to the KL divergences. Amari, "alpha-divergence is
    # unique, belonging to both f-divergence and Bregman divergence classes", IEEE Trans. Inf. Theory 55 (2009), with
    # alpha = 1 - beta; beta = 1/2 is four times the squared Hellinger distance.
    "alpha": Family("alpha", at_0="forward_kl", at_1="reverse_kl"),
}

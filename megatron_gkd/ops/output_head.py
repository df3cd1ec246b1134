"""The language-model head: last hidden states to logits, with a bias, a scale and a softcap where a model has them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_gkd.ops import passes
from megatron_gkd.ops.spec import round_to


@dataclass(frozen=True)
class OutputHead:
    """Hold what turns hidden states h into logits: y = cap tanh(z / cap) with z = scale (h W^T + b).

    Attributes:
        weight: [V/TP, H], W, this rank's rows.
        bias: [V/TP], b; None without one.
        scale: of all logits, > 0.
        softcap: cap, > 0, which bounds the logits; None: y = z.

    Raises:
        ValueError: the scale or the softcap is not positive and finite.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("scale", self.scale), ("softcap", self.softcap)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} = {value}: must be positive and finite")

    @property
    def largest_logit(self) -> float | None:
        """The softcap as logits hold it, in the weight's dtype: the slope there is 0; None without one."""
        return None if self.softcap is None else round_to(self.softcap, self.weight.dtype)

    def with_tensors(self, weight: Tensor, bias: Tensor | None) -> OutputHead:
        """Return the same head with other tensors."""
        return replace(self, weight=weight, bias=bias)

    def detach(self) -> OutputHead:
        """Return the same head without gradients."""
        return self.with_tensors(self.weight.detach(), None if self.bias is None else self.bias.detach())

    def clone(self) -> OutputHead:
        """Return a copy without gradients."""
        return self.with_tensors(
            self.weight.detach().clone(), None if self.bias is None else self.bias.detach().clone()
        )

    @torch.no_grad()
    def copy_(self, other: OutputHead) -> None:
        """Overwrite the tensors with those of a head of the same shape."""
        self.weight.copy_(other.weight)
        if self.bias is not None and other.bias is not None:
            self.bias.copy_(other.bias)

    def rows(self, count: int) -> OutputHead:
        """Return the head of the first `count` columns, as views."""
        return self.with_tensors(self.weight[:count], None if self.bias is None else self.bias[:count])

    @torch.no_grad()
    def compute_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits [N, V/TP] of hidden states [N, H], in their dtype and without a gradient.

        Bias and scale are part of the product, and cost no rounding of their own.

        Args:
            hidden: [N, H], of the weight's dtype.
            out: [N, V/TP], which is overwritten and returned; None for a new tensor.
        """
        weight = self.weight.t()
        if self.bias is not None:
            logits = torch.addmm(self.bias, hidden, weight, beta=self.scale, alpha=self.scale, out=out)
        elif self.scale != 1:
            logits = torch.addmm(hidden.new_zeros(1), hidden, weight, beta=0, alpha=self.scale, out=out)
        else:
            logits = torch.mm(hidden, weight, out=out)
        if self.softcap is not None:
            passes.softcap(logits, self.softcap)
        return logits

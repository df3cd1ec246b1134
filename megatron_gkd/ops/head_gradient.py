"""Where the gradient of the language-model head's weight is accumulated, chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops.add_product import add_product
from megatron_gkd.ops.spec import accumulate_dtype


@dataclass(frozen=True)
class HeadGradient:
    """Accumulates in fp32 (fp64 for fp64), into a buffer of its own or straight into Megatron's `main_grad`.

    Megatron's DistributedDataParallel gives each weight a `main_grad`. Layers that add to it themselves set the
    weight's `grad_added_to_main_grad` and return a tensor that only makes the weight's hook fire: zeros where the
    weight is shared with an embedding (`zero_out_wgrad`), whose own gradient is added to them, else anything.
    """

    weight: Tensor  # [V/TP, H]
    buffer: Tensor | None  # of the weight's shape; None where chunks go to `main_grad`

    @classmethod
    def of(cls, weight: Tensor, is_final: bool) -> HeadGradient:
        """`is_final`: what is added needs no further factor, as the gradient of the total is known before backward."""
        if is_final and getattr(weight, "main_grad", None) is not None:
            return cls(weight, None)
        return cls(weight, torch.zeros(weight.shape, dtype=accumulate_dtype(weight.dtype), device=weight.device))

    def add(self, logits_gradient: Tensor, hidden: Tensor) -> None:
        """Of one chunk: [n, V'] for the first V' rows, and [n, H]."""
        target = self.weight.main_grad if self.buffer is None else self.buffer
        add_product(target[: logits_gradient.shape[1]], logits_gradient.t(), hidden)

    def finish(self, buffer: Tensor | None, factor: Tensor | None) -> Tensor:
        """What backward returns for the weight. `factor`: the gradient of the total, None where it is in `buffer`."""
        if getattr(self.weight, "main_grad", None) is None:
            return (buffer if factor is None else buffer * factor).to(self.weight.dtype)
        if factor is not None:
            self.weight.main_grad.addcmul_(buffer, factor.to(buffer.dtype))
        self.weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)

"""Where the gradients of a language-model head and of its hidden states are accumulated, chunk by chunk."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_gkd.ops.add_product import add_product, multiply_in_full_precision
from megatron_gkd.ops.spec import accumulate_dtype

Product = Callable[[], None]


@dataclass
class HeadGradient:
    """Accumulate in fp32 (fp64 for fp64), into a buffer or directly into Megatron's `main_grad`.

    Megatron's DistributedDataParallel sets a `main_grad` on each weight. Layers that add to it themselves set the
    weight's `grad_added_to_main_grad` and return a tensor that only triggers the weight's hook: zeros where the weight
    is shared with an embedding (`zero_out_wgrad`), whose own gradient is added to them, else anything.

    Attributes:
        weight: [V/TP, H], or the bias [V/TP]. Megatron adds attributes to it that a Tensor does not have, hence the
            type.
        buffer: of the weight's shape; None where chunks are added to `main_grad`.
        is_unwritten: whether the buffer holds nothing yet: the first chunk overwrites it.
    """

    weight: Any
    buffer: Tensor | None
    is_unwritten: bool = False

    @classmethod
    def from_weight(cls, weight: Tensor, is_final: bool) -> HeadGradient:
        """Prepare the accumulation.

        Args:
            weight: [V/TP, H], or the bias [V/TP].
            is_final: whether what is added needs no further factor, because the gradient of the total is known.
        """
        if is_final and getattr(weight, "main_grad", None) is not None:
            return cls(weight, None)
        buffer = torch.empty(weight.shape, dtype=accumulate_dtype(weight.dtype), device=weight.device)
        return cls(weight, buffer, is_unwritten=True)

    def add(self, logits_gradient: Tensor, hidden: Tensor) -> None:
        """Add the gradient of the weight of one chunk.

        Args:
            logits_gradient: [n, V'], by the logits of the first V' rows of the weight.
            hidden: [n, H].
        """
        target, columns = self._target, logits_gradient.shape[1]
        add_product(target[:columns], logits_gradient.t(), hidden, overwrite=self.is_unwritten)
        self._complete(columns)

    def add_rows(self, logits_gradient: Tensor) -> None:
        """Add the gradient of the bias of one chunk, from that by the logits of its first V' entries, [n, V']."""
        self.complete()
        target = self._target
        target[: logits_gradient.shape[1]] += logits_gradient.sum(0, dtype=target.dtype)

    def complete(self) -> None:
        """Fill a buffer that no chunk was added to."""
        self._complete(0)

    def _complete(self, columns: int) -> None:
        if self.is_unwritten and self.buffer is not None:
            self.buffer[columns:] = 0
        self.is_unwritten = False

    @property
    def _target(self) -> Tensor:
        return self.weight.main_grad if self.buffer is None else self.buffer

    def finish(self, buffer: Tensor | None, factor: Tensor | None) -> Tensor:
        """Return what backward returns for the weight.

        Args:
            buffer: the buffer, as saved for backward; None where chunks were added to `main_grad`.
            factor: the gradient of the total; None where the buffer contains it.

        Raises:
            RuntimeError: chunks were added to a `main_grad` that the weight no longer has.
        """
        if getattr(self.weight, "main_grad", None) is None:
            if buffer is None:
                raise RuntimeError("weight.main_grad: None in backward, but the gradient was added to it in forward")
            return _scaled(buffer, factor, self.weight.dtype)
        if buffer is not None:
            self.weight.main_grad.addcmul_(buffer, buffer.new_ones(()) if factor is None else factor.to(buffer.dtype))
        self.weight.grad_added_to_main_grad = True
        make = torch.zeros_like if getattr(self.weight, "zero_out_wgrad", False) else torch.empty_like
        return make(self.weight)


def _scaled(x: Tensor, factor: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return x * factor in another dtype, without a copy of x in its own."""
    if factor is None:
        return x.to(dtype)
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


class LinearGradients(NamedTuple):
    """Where the gradients of a model's tensors go; None for those that are not needed.

    Attributes:
        hidden: [N, H], by the hidden states.
        weight: by the head's weight.
        bias: by the head's bias.
    """

    hidden: Tensor | None
    weight: HeadGradient | None
    bias: HeadGradient | None

    @property
    def is_needed(self) -> bool:
        """Whether there is any."""
        return any(gradient is not None for gradient in self)

    def products(self, chunk: slice, logits_gradient: Tensor, hidden: Tensor, weight: Tensor) -> list[Product]:
        """Return what computes those of a chunk of tokens, each to be called once.

        Args:
            chunk: of the N tokens.
            logits_gradient: [n, V'], by the product with the first V' rows of the weight.
            hidden: [N, H].
            weight: [V/TP, H].
        """
        products: list[Product] = []
        if self.hidden is not None:
            of_chunk, rows = self.hidden[chunk], weight[: logits_gradient.shape[1]]
            products.append(lambda: multiply_in_full_precision(logits_gradient, rows, of_chunk))
        if self.weight is not None:
            products.append(partial(self.weight.add, logits_gradient, hidden[chunk]))
        if self.bias is not None:
            products.append(partial(self.bias.add_rows, logits_gradient))
        return products

    def complete(self) -> None:
        """Fill the buffers that no chunk was added to."""
        for gradient in (self.weight, self.bias):
            if gradient is not None:
                gradient.complete()


class DeferredProducts(deque[Product]):
    """Hold products that run while a collective is under way, in order."""

    def run_next(self) -> None:
        """Run the next one, if there is any."""
        if self:
            self.popleft()()

    def run_all(self) -> None:
        """Run all."""
        while self:
            self.run_next()

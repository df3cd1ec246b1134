"""Add the gradient of an embedding directly to Megatron's gradient buffer.

Autograd's own is a dense [V/TP, H] of zeros but for the rows of a microbatch's tokens, which DistributedDataParallel
then adds to `main_grad`: three passes over a tensor of the vocabulary's size for each microbatch.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_gkd.runtime import portability


def add_embedding_gradients_directly() -> None:
    """Let Megatron's embeddings add their gradients to `main_grad` where there is one. Idempotent."""
    from megatron.core.tensor_parallel import layers

    functional = types.ModuleType(F.__name__)
    vars(functional).update(vars(F), embedding=embedding)
    layers.F = functional


def embedding(ids: Tensor, weight: Any) -> Tensor:
    """Return the rows [..., H] of `weight` [V/TP, H] at `ids`, like `torch.nn.functional.embedding`."""
    if getattr(weight, "main_grad", None) is None or not (weight.requires_grad and torch.is_grad_enabled()):
        return F.embedding(ids, weight)
    if getattr(weight, "zero_out_wgrad", False):
        # The head of the same weight need not return zeros for the embedding's gradient to be added to.
        weight.zero_out_wgrad, weight.has_head_gradient = False, True
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        (ids,), weight = ctx.saved_tensors, ctx.weight
        _add_rows(weight.main_grad, ids.flatten(), gradient.flatten(0, -2))
        weight.grad_added_to_main_grad = True
        # What is returned only triggers the weight's hook, which that of the head does where they share the weight.
        return None, None if getattr(weight, "has_head_gradient", False) else torch.empty_like(weight)


def _add_rows(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """Add values [n, H] to rows [n] of the target [V/TP, H], in an order that does not vary between runs."""
    values = values.to(target.dtype)
    if portability.builds_on_host():
        target.index_add_(0, rows, values)
    else:  # index_add_ is not deterministic there
        target.index_put_((rows,), values, accumulate=True)

"""Mixtures of experts whose tokens are spread evenly, since no token has a value that could route it.

The ranks of an expert-parallel group are not equally loaded in a run: this rank is taken as the busiest one, whose
experts get `expert_imbalance` times the mean.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_gkd.runtime.preload  # noqa: F401  (before any import of Megatron-Core)
from megatron_gkd.runtime import token_gathering
from megatron_gkd.runtime.meta_device.assumptions import current

from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher, MoEAlltoAllTokenDispatcher


def balance_routing() -> None:
    """Replace what the token dispatchers read from the routing, for the rest of the process."""
    selection = _BalancedSelection()
    selection.replace_methods()
    token_gathering._gather_sizes = _equal_sizes
    _balance_all_to_all(selection)
    _balance_all_gather(selection)
    # A backward pass without Megatron's schedule would set it to a scalar, which a schedule can't overwrite.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1, device="meta"))


class _BalancedSelection:
    """The expected results of the operations that depend on values.

    These are methods of tensors; modes of torch functions do not reach the passes that are recomputed in backward.

    Attributes:
        num_selected: elements of the result of `masked_select`, by which tokens are sorted.
        counts: int64 [local experts], what the dispatcher moves to the CPU; None outside of it.
    """

    def __init__(self) -> None:
        self.num_selected = 0
        self.counts: Tensor | None = None

    def replace_methods(self) -> None:
        """Replace the methods for tensors on the meta device."""
        select, move = torch.Tensor.masked_select, torch.Tensor.cpu

        def masked_select(x: Tensor, mask: Tensor) -> Tensor:
            result: Tensor = _Select.apply(x, mask, self.num_selected) if x.is_meta else select(x, mask)
            return result

        def cpu(x: Tensor, *args: Any, **options: Any) -> Tensor:
            return self.counts if x.is_meta and self.counts is not None else move(x, *args, **options)

        vars_of_tensor: Any = torch.Tensor
        vars_of_tensor.masked_select, vars_of_tensor.cpu = masked_select, cpu


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(mask)
        ctx.shape = x.shape
        return x.new_empty(count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.new_empty(ctx.shape), None, None


def _equal_sizes(size: int, group: dist.ProcessGroup) -> None:
    """Return None, by which every rank has as many tokens."""


def _spread(total: int, parts: int) -> Tensor:
    """Return int64 [parts] on the CPU whose sum is `total`, as equal as possible."""
    counts = torch.full((parts,), total // parts, dtype=torch.long, device="cpu")
    counts[: total % parts] += 1
    return counts


def _balance_all_to_all(selection: _BalancedSelection) -> None:
    original = MoEAlltoAllTokenDispatcher.preprocess

    @functools.wraps(original)
    def preprocess(self: Any, routing_map: Tensor) -> Tensor:
        original(self, routing_map)  # for its collective, and for what does not depend on values
        tokens = routing_map.shape[0] * self.config.moe_router_topk
        selection.num_selected = self.num_out_tokens = tokens
        imbalance = current().expert_imbalance if self.ep_size > 1 else 1.0
        received = min(round(tokens * imbalance), tokens * self.ep_size)
        experts, sources = self.num_local_experts, self.tp_size * self.ep_size
        per_source = _spread(received, self.ep_size)
        if sources > 1:
            self.input_splits, self.output_splits = _spread(tokens, self.ep_size), per_source
            self.output_splits_tp = torch.full((self.tp_size,), received, dtype=torch.long, device="cpu")
        by_source = torch.stack([_spread(int(count), experts) for count in per_source]).repeat(self.tp_size, 1)
        if experts > 1:
            self.num_global_tokens_per_local_expert = by_source
        return by_source.sum(0)

    MoEAlltoAllTokenDispatcher.preprocess = preprocess


def _balance_all_gather(selection: _BalancedSelection) -> None:
    original = MoEAllGatherTokenDispatcher.dispatch_postprocess

    @functools.wraps(original)
    def dispatch_postprocess(self: Any, hidden_states: Tensor, probs: Tensor) -> Any:
        experts, topk = self.num_local_experts, self.config.moe_router_topk
        imbalance = current().expert_imbalance if self.ep_size > 1 else 1.0
        tokens = hidden_states.shape[0]
        received = min(round(tokens * topk * imbalance / self.ep_size), tokens * min(topk, experts))
        selection.num_selected = received
        selection.counts = _spread(received, experts)
        try:
            return original(self, hidden_states, probs)
        finally:
            selection.counts = None

    MoEAllGatherTokenDispatcher.dispatch_postprocess = dispatch_postprocess

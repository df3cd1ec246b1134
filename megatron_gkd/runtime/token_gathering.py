"""Megatron-Core's all-gather dispatcher of tokens, for ranks with different numbers of tokens."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.runtime import portability


def gather_tokens_of_different_numbers() -> None:
    """Let the dispatcher of the type `allgather` take different numbers of tokens from the ranks. Idempotent.

    The ranks that share experts may have different rows, whose lengths differ: data-parallel ranks in training, and
    context-parallel ranks as well where they sample. Megatron's own dispatcher gathers tensors of one length, so that
    its configuration refuses microbatches of different lengths with it. The numbers of tokens are exchanged once in
    each layer, which waits for the device as the all-to-all dispatcher does.

    Upstream: `megatron/core/transformer/moe/token_dispatcher.py`, `MoEAllGatherTokenDispatcher`, 0.16.1. Delete this
    once it takes different lengths.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher

    original = MoEAllGatherTokenDispatcher.token_dispatch
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def token_dispatch(self: MoEAllGatherTokenDispatcher, hidden: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        if self.tp_size == self.ep_size == 1:
            return hidden, probs
        group, sizes = self.tp_ep_group, _gather_sizes(len(hidden), self.tp_ep_group)
        self.sizes_of_ranks = sizes
        with torch.no_grad():
            self.routing_map = mappings.gather_from_sequence_parallel_region(
                self.routing_map, group=group, output_split_sizes=sizes
            )
        probs = mappings.gather_from_sequence_parallel_region(probs, group=group, output_split_sizes=sizes)
        hidden = mappings.gather_from_sequence_parallel_region(hidden, group=group, output_split_sizes=sizes)
        return hidden, probs

    @functools.wraps(MoEAllGatherTokenDispatcher.token_combine)
    def token_combine(self: MoEAllGatherTokenDispatcher, hidden: Tensor) -> Tensor:
        if self.tp_size == self.ep_size == 1:
            return hidden
        combined = mappings.reduce_scatter_to_sequence_parallel_region(
            hidden.to(self.local_probs.dtype), group=self.tp_ep_group, input_split_sizes=self.sizes_of_ranks
        )
        return combined.to(hidden.dtype)

    MoEAllGatherTokenDispatcher.token_dispatch = token_dispatch
    MoEAllGatherTokenDispatcher.token_combine = token_combine


def _gather_sizes(size: int, group: dist.ProcessGroup) -> list[int] | None:
    """Return every rank's `size`; None where all are equal."""
    own = torch.tensor([size], device=portability.device())
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    sizes: list[int] = torch.cat(gathered).tolist()
    return None if len(set(sizes)) == 1 else sizes

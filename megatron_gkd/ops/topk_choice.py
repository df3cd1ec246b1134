"""The choice of the teacher's most likely tokens over a sharded vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.ops import topk_passes
from megatron_gkd.ops.spec import accumulate_dtype, check_temperature
from megatron_gkd.ops.topk import TopK, describe
from megatron_gkd.ops.vocabulary import VocabShard, group_of_name, name_of_group


def vocab_parallel_topk(
    logits: Tensor,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | None = 1.0,
) -> TopK:
    """Return the k largest logits of each row, largest first; among equal ones those with the lower id.

    Each rank selects among its own columns. One all_gather of these candidates (8 bytes each, logit and id) and of the
    mass of the others (8 bytes per row) lets every rank make the same selection among them; twice that in fp64.

    Args:
        logits: float [..., V/TP], this rank's columns. The result carries no gradient.
        k: from 1 to the size of the true vocabulary.
        group: see ``DivergenceSpec``.
        vocab_size: see ``DivergenceSpec``.
        temperature: of ``TopK.tail``; None leaves the tail out, and saves a pass.

    Returns:
        ids [..., k]; values in fp32 (fp64 for fp64), the largest of each row being 0; and the tail, a log-sum-exp over
        the columns that were not selected, -inf if there are none. The same bits on every rank; ids and values do not
        depend on the number of ranks.

    Raises:
        ValueError: k or temperature is out of range, or `logits` are no floats.
    """
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(f"logits = {describe(logits)}: must be floats [..., V]")
    tokens, width = logits.shape[:-1], logits.shape[-1]
    shard = VocabShard.from_group(width, group, vocab_size)
    check_k(k, shard)
    if temperature is not None:
        check_temperature(temperature)
    ids, values, tail = _choose(
        logits.detach().reshape(-1, width),
        k,
        None if temperature is None else float(temperature),
        shard.vocab_size,
        name_of_group(group),
    )
    tails = None if temperature is None else tail.view(tokens)
    return TopK(ids.view(*tokens, k), values.view(*tokens, k), tails, temperature)


def check_k(k: int, shard: VocabShard) -> None:
    """Raise ValueError unless k is from 1 to the size of the true vocabulary."""
    if not 1 <= k <= shard.vocab_size:
        raise ValueError(f"k = {k}: must be from 1 to {shard.vocab_size}, the size of the vocabulary")


def choose_topk(logits_NV: Tensor, k: int, shard: VocabShard, temperature: float | None) -> TopK:
    """Compute ``vocab_parallel_topk`` of the valid columns [N, V] of a shard."""
    places = min(k, shard.width)
    candidates = topk_passes.select(logits_NV, places, shard, temperature)
    return topk_passes.merge(shard.gather(candidates), k, places, accumulate_dtype(logits_NV.dtype), temperature)


@torch.library.custom_op("megatron_gkd::vocab_parallel_topk", mutates_args=())
def _choose(
    logits: Tensor, k: int, temperature: float | None, vocab_size: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and values [N, k], and the tail [N], or [0] without one."""
    shard = VocabShard.from_group(logits.shape[1], group_of_name(group), vocab_size)
    topk = choose_topk(logits[:, : shard.valid], k, shard, temperature)
    return topk.ids, topk.values, topk.values.new_empty(0) if topk.tail is None else topk.tail


@_choose.register_fake
def _fake_choose(
    logits: Tensor, k: int, temperature: float | None, vocab_size: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = logits.shape[0], accumulate_dtype(logits.dtype)
    return (
        logits.new_empty(rows, k, dtype=torch.int64),
        logits.new_empty(rows, k, dtype=dtype),
        logits.new_empty(0 if temperature is None else rows, dtype=dtype),
    )

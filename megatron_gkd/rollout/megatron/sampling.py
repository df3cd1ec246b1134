"""Draw the next token: a pure function of the logits, the prompt's seed and the token's position.

Every (seed, position, token id) has a random number of its own, made by hashing the three, so that neither the layout
nor the rest of the batch changes it. The token is the argmax of log-probability plus Gumbel noise. This is a draw from
the distribution that the rounding of the logits hardly ever changes: a draw by the cumulated distribution would move
all boundaries when one probability moves.

The vocabulary stays sharded. Each rank takes the best token of its own columns, and one gather of four numbers a row
and rank decides.

Shape suffixes: n rows, V this rank's columns, R ranks, c numbers of a candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron.filters import apply_top_k, apply_top_p

_MAX_BLOCK_ELEMENTS = 2**24  # of a block of logits in fp64, of which a few copies are alive at once


def sample(
    logits_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Draw one token a row. All ranks of the shard's group call it together, with the same rows.

    Args:
        logits_nV: this rank's columns, of any floating type; computed with in fp64.
        seeds_n: int64, one a row.
        positions_n: int64, how many tokens of its completion a row has already.
        sampling: temperature, top-k, top-p and reserved ids.
        shard: the columns of this rank, and how many ids may be drawn.

    Returns:
        The tokens, int64 [n], and their log-probabilities in nats, fp64 [n], untempered and unfiltered; reserved ids
        count in them. The same on every rank.
    """
    rows = max(1, _MAX_BLOCK_ELEMENTS // logits_nV.shape[1])
    blocks = zip(logits_nV.split(rows), seeds_n.split(rows), positions_n.split(rows), strict=True)
    tokens, log_probs = zip(*(_sample_block(*block, sampling, shard) for block in blocks), strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _sample_block(
    logits_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    if shard.valid:
        logits_nV = logits_nV[:, : shard.valid].double()
    else:  # one column that is never drawn, so that the ranks make the same collectives
        logits_nV = logits_nV.new_full((len(logits_nV), 1), -math.inf, dtype=torch.float64)
    scores_nV = _exclude(logits_nV, sampling.reserved_ids, shard)
    if sampling.temperature > 0:
        scores_nV = scores_nV / sampling.temperature
        if sampling.top_k:
            scores_nV = apply_top_k(scores_nV, sampling.top_k, shard)
        if sampling.top_p < 1:
            scores_nV = apply_top_p(scores_nV, sampling.top_p, shard)
        scores_nV = scores_nV + gumbel_noise(seeds_n, positions_n, shard.first, scores_nV.shape[1])
    columns_n1 = scores_nV.argmax(-1, keepdim=True)
    candidates_nc = torch.cat(
        [
            scores_nV.gather(1, columns_n1),
            (columns_n1 + shard.first).double(),
            logits_nV.gather(1, columns_n1),
            logits_nV.logsumexp(-1, keepdim=True),
        ],
        -1,
    )
    gathered_Rnc = shard.gather(candidates_nc)
    best_n = gathered_Rnc[..., 0].argmax(0)  # of equal scores the first rank's, and so the lowest id
    chosen_nc = gathered_Rnc[best_n, torch.arange(len(best_n), device=best_n.device)]
    return chosen_nc[:, 1].long(), chosen_nc[:, 2] - gathered_Rnc[..., 3].logsumexp(0)


def _exclude(logits_nV: Tensor, ids: Sequence[int], shard: VocabShard) -> Tensor:
    """Return the logits with -inf at those of `ids` that this rank has."""
    columns = [one - shard.first for one in ids if 0 <= one - shard.first < logits_nV.shape[1]]
    return logits_nV.index_fill(1, torch.tensor(columns, device=logits_nV.device), -math.inf) if columns else logits_nV


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants (Steele, Lea and Flood 2014), as int64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def gumbel_noise(seeds_n: Tensor, positions_n: Tensor, first_id: int, num_ids: int) -> Tensor:
    """Return standard Gumbel noise, fp64 [n, num_ids], of the token ids from `first_id` on.

    Row i is SplitMix64's stream of a key made of its seed and position; a token id is a place in the stream.
    """
    keys_n = _mix(_mix(seeds_n + _GOLDEN) + (positions_n + 1) * _GOLDEN)
    counters_V = torch.arange(first_id + 1, first_id + num_ids + 1, device=seeds_n.device) * _GOLDEN
    # 52 bits and a half, so that neither 0 nor 1 comes out.
    uniform_nV = (_shift_right(_mix(keys_n[:, None] + counters_V), 12).double() + 0.5) * 2.0**-52
    return -(-uniform_nV.log()).log()


def fold_to_int64(seed: int) -> int:
    """Return any integer folded into the range of an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer; int64 products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift an int64 as if it were unsigned: zeros come in from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

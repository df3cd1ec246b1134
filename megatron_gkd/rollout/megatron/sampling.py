"""Draw the next token: a pure function of the logits, the prompt's seed and the token's position.

A draw is the argmax of log-probability plus Gumbel noise. The rounding of the logits hardly ever changes it: a draw by
the cumulated distribution would move all boundaries when one probability moves. Noise is made for few ids: of one
block of the vocabulary (`blocks`), or of those that may pass the filters (`candidates`); only where a filter keeps more
is it made for all of them.

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
from megatron_gkd.rollout.megatron.blocks import BlockSums, draw_by_blocks
from megatron_gkd.rollout.megatron.candidates import draw_among_candidates
from megatron_gkd.rollout.megatron.filters import apply_min_p, apply_top_k, apply_top_p, penalize_repetition
from megatron_gkd.rollout.megatron.noise import gumbel_noise

_MAX_BLOCK_ELEMENTS = 2**24  # of a block of logits, of which a few copies are alive at once


def sample(
    logits_nV: Tensor,
    seeds_n: Tensor,
    positions_n: Tensor,
    sampling: Sampling,
    shard: VocabShard,
    is_seen_nV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row. All ranks of the shard's group call it together, with the same rows.

    Args:
        logits_nV: this rank's columns, of any floating type; computed with in fp32, or in fp64 where they are fp64.
        seeds_n: int64, one a row.
        positions_n: int64, how many tokens of its completion a row has already.
        sampling: penalty, temperature, filters and reserved ids.
        shard: the columns of this rank, and how many ids may be drawn.
        is_seen_nV: bool, which ids have occurred in each row's prompt and completion; needed for a penalty.

    Returns:
        The tokens, int64 [n], and their log-probabilities in nats, fp64 [n], of the logits as they are; reserved ids
        count in them. The same on every rank.
    """
    rows = max(1, _MAX_BLOCK_ELEMENTS // logits_nV.shape[1])
    tokens, log_probs = [], []
    for start in range(0, len(logits_nV), rows):
        block = slice(start, start + rows)
        is_seen = None if is_seen_nV is None else is_seen_nV[block]
        drawn = _sample_block(logits_nV[block], seeds_n[block], positions_n[block], is_seen, sampling, shard)
        tokens.append(drawn[0])
        log_probs.append(drawn[1])
    return torch.cat(tokens), torch.cat(log_probs)


def _sample_block(
    logits_nV: Tensor,
    seeds_n: Tensor,
    positions_n: Tensor,
    is_seen_nV: Tensor | None,
    sampling: Sampling,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    if shard.valid:
        logits_nV = logits_nV[:, : shard.valid]
        logits_nV = logits_nV if logits_nV.dtype == torch.float64 else logits_nV.float()
    else:  # one column that is never drawn, so that the ranks make the same collectives
        logits_nV = logits_nV.new_full((len(logits_nV), 1), -math.inf, dtype=torch.float32)
    scores_nV = logits_nV
    if is_seen_nV is not None and shard.valid:
        scores_nV = penalize_repetition(scores_nV, is_seen_nV[:, : shard.valid], sampling.repetition_penalty)
    scores_nV = _exclude(scores_nV, sampling.reserved_ids, shard)
    sums = BlockSums.from_scores(logits_nV, shard)
    if sampling.temperature > 0 and (sampling.min_p or sampling.top_k or sampling.top_p < 1):
        tokens_n, chosen_n = _draw_filtered(logits_nV, scores_nV, seeds_n, positions_n, sampling, shard)
        return tokens_n, chosen_n - shard.gather(sums.logsumexp()).logsumexp(0)
    if sampling.temperature == 0:
        columns_n = scores_nV.argmax(-1)
        best_n = scores_nV.gather(1, columns_n[:, None])[:, 0].double()
    else:
        if sampling.temperature != 1:
            scores_nV = scores_nV / sampling.temperature
        own_sums = sums if scores_nV is logits_nV else BlockSums.from_scores(scores_nV, shard)
        best_n, columns_n = draw_by_blocks(scores_nV, own_sums, seeds_n, positions_n, shard)
    tokens_n, chosen_n, normalizers_Rn = _choose(best_n, columns_n, logits_nV, sums.logsumexp(), shard)
    return tokens_n, chosen_n - normalizers_Rn.logsumexp(0)


def _draw_filtered(
    logits_nV: Tensor, scores_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Return the tokens, int64 [n], and their logits, fp64 [n]; the same on every rank."""
    (tokens_n, chosen_n), rows = draw_among_candidates(logits_nV, scores_nV, seeds_n, positions_n, sampling, shard)
    if len(rows):
        scores = _filter_whole(scores_nV[rows].double(), sampling, shard)
        ids_V = torch.arange(scores.shape[1], device=scores.device) + shard.first
        best, columns = (scores + gumbel_noise(seeds_n[rows], positions_n[rows], ids_V)).max(-1)
        tokens, chosen_n[rows], _ = _choose(best, columns, logits_nV[rows], torch.zeros_like(best), shard)
        tokens_n[rows] = tokens.double()
    return tokens_n.long(), chosen_n


def _filter_whole(scores_nV: Tensor, sampling: Sampling, shard: VocabShard) -> Tensor:
    """Return the scores divided by the temperature, with -inf where a filter excludes an id."""
    scores_nV = scores_nV / sampling.temperature
    if sampling.min_p:
        scores_nV = apply_min_p(scores_nV, sampling.min_p, shard)
    if sampling.top_k:
        scores_nV = apply_top_k(scores_nV, sampling.top_k, shard)
    return apply_top_p(scores_nV, sampling.top_p, shard) if sampling.top_p < 1 else scores_nV


def _choose(
    best_n: Tensor, columns_n: Tensor, logits_nV: Tensor, normalizers_n: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the best of all ranks, of equal ones the lowest id.

    Args:
        best_n: fp64, the largest of this rank.
        columns_n: int64, where it is.
        logits_nV: the model's.
        normalizers_n: fp64, of this rank's columns.
        shard: the columns of this rank.

    Returns:
        The tokens, int64 [n], their logits, fp64 [n], and the normalizers of all ranks, [R, n].
    """
    chosen_n = logits_nV.gather(1, columns_n[:, None])[:, 0].double()
    ids_n = (columns_n + shard.first).double()
    gathered_Rnc = shard.gather(torch.stack([best_n, ids_n, chosen_n, normalizers_n], -1))
    first_n = gathered_Rnc[..., 0].argmax(0)  # of equal scores the first rank's, and so the lowest id
    chosen_nc = gathered_Rnc[first_n, torch.arange(len(first_n), device=first_n.device)]
    return chosen_nc[:, 1].long(), chosen_nc[:, 2], gathered_Rnc[..., 3]


def _exclude(logits_nV: Tensor, ids: Sequence[int], shard: VocabShard) -> Tensor:
    """Return the logits with -inf at those of `ids` that this rank has."""
    columns = [one - shard.first for one in ids if 0 <= one - shard.first < logits_nV.shape[1]]
    return logits_nV.index_fill(1, torch.tensor(columns, device=logits_nV.device), -math.inf) if columns else logits_nV

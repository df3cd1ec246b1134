"""Draws among the likeliest ids of all ranks, where min-p, top-k and top-p leave no others.

Each rank gives its `count` largest scores. Of the ids that it does not give none has a larger score than the smallest
that it gives: the largest of these smallest scores is the floor. If all ids that the filters keep have scores above
the floor, no other id can be among them, and the draw is the one that `filters` would make from the whole vocabulary.

Shape suffixes: n rows, V this rank's columns, R ranks, k scores that a rank gives, c candidates of all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron.filters import integer_weights, sum_of_weights
from megatron_gkd.rollout.megatron.noise import gumbel_noise

COUNTS = (256, 2048, 16384)
"""Scores that a rank gives: rows for which a number is too small try the next one."""


@dataclass(frozen=True)
class Candidates:
    """The largest scores of all ranks in falling order, of equal ones the lower ids first; the same on every rank.

    Attributes:
        scores_nc: fp64.
        ids_nc: int64.
        logits_nc: fp64, the model's.
        floor_n: fp64; no other id has a larger score. -inf if there is no other id.
    """

    scores_nc: Tensor
    ids_nc: Tensor
    logits_nc: Tensor
    floor_n: Tensor

    @classmethod
    def gather(
        cls, logits_nV: Tensor, scores_nV: Tensor, temperature: float, count: int, shard: VocabShard
    ) -> Candidates:
        """Gather the `count` largest scores of each rank, or all, and divide them by the temperature."""
        num_given = min(count, shard.width)
        num_own = min(num_given, scores_nV.shape[1])
        values_nk, columns_nk = scores_nV.topk(num_own)
        given = logits_nV.new_zeros(3, len(scores_nV), num_given, dtype=torch.float64)
        given[0].fill_(-math.inf)
        given[0, :, :num_own] = values_nk
        given[1, :, :num_own] = columns_nk + shard.first
        given[2, :, :num_own] = logits_nV.gather(1, columns_nk)
        scores_nc, ids_nc, logits_nc = shard.gather(given).permute(1, 2, 0, 3).flatten(2)
        has_others = num_own < shard.valid
        floor_n = values_nk[:, -1].double() if has_others else scores_nc.new_full((len(scores_nc),), -math.inf)
        floor_n = shard.gather(floor_n).amax(0)
        ids_nc, by_id = ids_nc.long().sort(-1)
        scores_nc, by_score = scores_nc.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
        order = by_id.gather(1, by_score)
        return cls(
            scores_nc / temperature, ids_nc.gather(1, by_score), logits_nc.gather(1, order), floor_n / temperature
        )

    def filter(self, sampling: Sampling, total_n: Tensor | None, shard: VocabShard) -> tuple[Tensor, Tensor]:
        """Apply min-p, top-k and top-p.

        Args:
            sampling: the filters.
            total_n: int64, the weights of all ids (`filters.integer_weights`); None where min-p or top-k filter first.
            shard: the columns of this rank.

        Returns:
            Which candidates are kept, bool [n, c], and whether no other id would be, bool [n].
        """
        scores_nc = self.scores_nc
        if sampling.min_p:
            limit_n1 = scores_nc[:, :1] + math.log(sampling.min_p)
            scores_nc = scores_nc.masked_fill(scores_nc < limit_n1, -math.inf)
        if sampling.top_k and sampling.top_k <= scores_nc.shape[1]:
            kth_n1 = scores_nc[:, sampling.top_k - 1 : sampling.top_k]
            scores_nc = scores_nc.masked_fill(scores_nc < kth_n1, -math.inf)
        is_certain_n = self._is_certain(scores_nc) if total_n is None else None
        if sampling.top_p < 1:
            weights_nc = integer_weights(scores_nc, self.scores_nc[:, 0], shard)
            sums_nc = weights_nc.cumsum(-1)
            total_n = sums_nc[:, -1] if total_n is None else total_n
            target_n = (total_n.double() * sampling.top_p).ceil().long()
            scores_nc = scores_nc.masked_fill(sums_nc - weights_nc >= target_n[:, None], -math.inf)
        # Where other filters come first, top-p needs the weights of all that they keep.
        return scores_nc > -math.inf, self._is_certain(scores_nc) if is_certain_n is None else is_certain_n

    def _is_certain(self, scores_nc: Tensor) -> Tensor:
        """Return whether no other id can be among those whose score is not -inf, bool [n]."""
        lowest_n = torch.where(scores_nc > -math.inf, scores_nc, math.inf).amin(-1)
        return (lowest_n > self.floor_n) & (scores_nc[:, 0] > -math.inf)


def draw_among_candidates(
    logits_nV: Tensor,
    scores_nV: Tensor,
    seeds_n: Tensor,
    positions_n: Tensor,
    sampling: Sampling,
    shard: VocabShard,
) -> tuple[Tensor, Tensor]:
    """Draw one id a row with the filters of `sampling`, where few candidates decide. All ranks call it together.

    Args:
        logits_nV: this rank's columns, fp32 or fp64, as the model has them.
        scores_nV: the logits with penalty and excluded ids; not divided by the temperature.
        seeds_n: int64, one a row.
        positions_n: int64, of the token that is drawn.
        sampling: the temperature and the filters.
        shard: the columns of this rank.

    Returns:
        Ids and logits of the draws, fp64 [2, n]; and the rows that need the whole vocabulary, int64, whose draws are
        missing. The same on every rank.
    """
    drawn_2n = logits_nV.new_zeros(2, len(logits_nV), dtype=torch.float64)
    rows = torch.arange(len(logits_nV), device=logits_nV.device)
    total_n = None
    if sampling.top_p < 1 and not sampling.min_p and not sampling.top_k:
        total_n = sum_of_weights(scores_nV, sampling.temperature, shard)
    num_ranks = 1 if shard.group is None else shard.group.size()
    for turn, count in enumerate(COUNTS):
        # Three numbers of each candidate of all ranks: no more than this rank's columns.
        if not len(rows) or (turn and 3 * num_ranks * count > shard.width):
            break
        is_all = len(rows) == len(logits_nV)
        logits, scores = (logits_nV, scores_nV) if is_all else (logits_nV[rows], scores_nV[rows])
        found = Candidates.gather(logits, scores, sampling.temperature, count, shard)
        is_kept_nc, is_certain_n = found.filter(sampling, None if total_n is None else total_n[rows], shard)
        noisy_nc = found.scores_nc + gumbel_noise(seeds_n[rows], positions_n[rows], found.ids_nc)
        best_n1 = torch.where(is_kept_nc, noisy_nc, -math.inf).argmax(-1, keepdim=True)
        drawn_2n[0, rows] = found.ids_nc.gather(1, best_n1)[:, 0].double()
        drawn_2n[1, rows] = found.logits_nc.gather(1, best_n1)[:, 0]
        rows = rows[~is_certain_n]
    return drawn_2n, rows

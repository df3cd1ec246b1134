"""The repetition penalty, and min-p, top-k and top-p, over a sharded vocabulary.

Scores that may not be drawn become -inf. No rank gathers the vocabulary. Min-p gathers the largest score of each rank,
top-k k values a rank. Top-p searches the score at which the nucleus ends, byte by byte of its bits: each of eight
rounds gathers 256 sums of probabilities a row and rank. Probabilities are added as integers, so that every layout, in
whatever order it adds, gets the same sums.

Shape suffixes: n rows, V this rank's columns, R ranks, k largest scores, B values of a digit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.runtime import portability

_DIGIT_BITS = 8


def penalize_repetition(logits_nV: Tensor, is_seen_nV: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of tokens that have occurred by `penalty`, and multiply negative ones by it."""
    return torch.where(is_seen_nV, torch.where(logits_nV < 0, logits_nV * penalty, logits_nV / penalty), logits_nV)


def apply_min_p(scores_nV: Tensor, min_p: float, shard: VocabShard) -> Tensor:
    """Keep the scores whose probability is at least `min_p`, above 0, of that of each row's largest score."""
    largest_n = shard.gather(scores_nV.amax(-1)).amax(0)
    return scores_nV.masked_fill(scores_nV < largest_n[:, None] + math.log(min_p), -math.inf)


def apply_top_k(scores_nV: Tensor, top_k: int, shard: VocabShard) -> Tensor:
    """Keep the `top_k` largest scores of each row over all ranks, and those equal to the smallest of them."""
    if top_k >= shard.vocab_size:
        return scores_nV
    num_candidates = min(top_k, shard.width)
    candidates_nk = scores_nV.new_full((len(scores_nV), num_candidates), -math.inf)
    num_local = min(num_candidates, scores_nV.shape[1])
    candidates_nk[:, :num_local] = scores_nV.topk(num_local).values
    candidates_Rnk = shard.gather(candidates_nk)
    kth_n1 = candidates_Rnk.transpose(0, 1).flatten(1).topk(top_k).values[:, -1:]
    return scores_nV.masked_fill(scores_nV < kth_n1, -math.inf)


def apply_top_p(scores_nV: Tensor, top_p: float, shard: VocabShard) -> Tensor:
    """Keep the largest scores up to the one at which their probabilities sum to `top_p`; of equals, the lower ids.

    A score is kept if the probability of all before it is less than `top_p`: the largest always is.

    Args:
        scores_nV: fp64; -inf is a probability of zero.
        top_p: from above 0 to below 1.
        shard: the columns of this rank.
    """
    largest_n = shard.gather(scores_nV.amax(-1)).amax(0)
    weights_nV, keys_nV = integer_weights(scores_nV, largest_n, shard), _sortable_bits(scores_nV)
    total_n = shard.gather(weights_nV.sum(-1)).sum(0)
    target_n = (total_n.double() * top_p).ceil().long()
    threshold_n1 = _find_threshold(keys_nV, weights_nV, target_n, shard)[:, None]
    is_larger_nV, is_equal_nV = keys_nV > threshold_n1, keys_nV == threshold_n1
    # How many of the equal scores have less than the target before them, and which of these are here.
    sums = [(weights_nV * is_larger_nV).sum(-1), (weights_nV * is_equal_nV).sum(-1), is_equal_nV.sum(-1)]
    larger_Rn, equal_Rn, counts_Rn = shard.gather(torch.stack(sums, -1)).unbind(-1)
    weight_n = equal_Rn.sum(0) // counts_Rn.sum(0).clamp(min=1)
    num_kept_n = -((larger_Rn.sum(0) - target_n) // weight_n.clamp(min=1))  # rounded up; no weight where scores are NaN
    rank = 0 if shard.group is None else shard.group.rank()
    place_nV = is_equal_nV.cumsum(-1) - 1 + counts_Rn[:rank].sum(0)[:, None]
    is_kept_nV = is_larger_nV | (is_equal_nV & (place_nV < num_kept_n[:, None]))
    return scores_nV.masked_fill(~is_kept_nV, -math.inf)


def integer_weights(scores_nV: Tensor, largest_n: Tensor, shard: VocabShard) -> Tensor:
    """Return each row's probabilities in int64, up to a factor: the largest for which the sum of all fits.

    Args:
        scores_nV: fp64, of any number of ids.
        largest_n: fp64, the row's largest score over all ranks.
        shard: of the vocabulary.
    """
    scale = 2 ** (62 - shard.vocab_size.bit_length())
    return (scores_nV - largest_n[:, None]).exp_().mul_(scale).round_().long()


def sum_of_weights(scores_nV: Tensor, temperature: float, shard: VocabShard) -> Tensor:
    """Return the sum of `integer_weights` of all ids, int64 [n], of scores that are divided by the temperature first.

    Rows are converted one by one where the processor's cache holds a row: their weights never reach the memory.
    """
    largest_n = shard.gather(scores_nV.amax(-1).double()).amax(0) / temperature
    num_rows = 1 if portability.builds_on_host() else len(scores_nV)
    sums = [
        integer_weights(scores.double() / temperature, largest, shard).sum(-1)
        for scores, largest in zip(scores_nV.split(num_rows), largest_n.split(num_rows), strict=True)
    ]
    return shard.gather(torch.cat(sums)).sum(0)


def _sortable_bits(x: Tensor) -> Tensor:
    """Return the bits of fp64 numbers as int64 that are in the same order."""
    bits = (x + 0.0).view(torch.int64)  # -0 becomes 0, so that equal numbers have equal bits
    return torch.where(bits < 0, bits ^ torch.iinfo(torch.int64).max, bits)


def _find_threshold(keys_nV: Tensor, weights_nV: Tensor, target_n: Tensor, shard: VocabShard) -> Tensor:
    """Return the largest key, int64 [n], such that keys at least as large have weights that sum to the target.

    It is found digit by digit, from the highest: each takes one gather of the sums [n, B] for all values of the digit.
    """
    sorted_nV, order_nV = keys_nV.sort(-1)
    weights_nV = weights_nV.gather(1, order_nV)
    smaller_nV = F.pad(weights_nV.cumsum(-1), (1, 0))  # sums of the weights before each place
    digits_B = torch.arange(1 << _DIGIT_BITS, device=keys_nV.device)
    key_n = torch.full_like(target_n, torch.iinfo(torch.int64).min)
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        bounds_nB = key_n[:, None] + (digits_B << shift)
        sums_nB = smaller_nV[:, -1:] - smaller_nV.gather(1, torch.searchsorted(sorted_nV, bounds_nB))
        is_reached_nB = shard.gather(sums_nB).sum(0) >= target_n[:, None]
        digit_n = (is_reached_nB.sum(-1) - 1).clamp(min=0)  # 0 always reaches it, unless scores are NaN
        key_n = key_n + (digit_n << shift)
    return key_n

"""Drawing the next token: a pure function of the logits, the prompt's seed and the token's position.

Every (seed, position, token id) has a random number of its own, made by hashing the three, so that neither the layout
nor what else is in the batch has a say. The token is the argmax of log-probability plus Gumbel noise, which is a draw
from the distribution, and which rounding of the logits hardly ever changes: a draw by the cumulated distribution would
move all boundaries when one probability moves.

Shape suffixes: n rows, V token ids.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_gkd.rollout.base import Sampling

_MOST_ELEMENTS = 2**24  # of a block of logits in fp64, of which a few copies are alive at once


def sample(logits_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token a row.

    Args:
        logits_nV: any floating type; computed with in fp64.
        seeds_n: int64, one a row.
        positions_n: int64, how many tokens of its completion a row has already.

    Returns:
        The tokens, int64 [n], and their log-probabilities in nats, fp64 [n], untempered and unfiltered.
    """
    rows = max(1, _MOST_ELEMENTS // logits_nV.shape[1])
    blocks = zip(logits_nV.split(rows), seeds_n.split(rows), positions_n.split(rows), strict=True)
    tokens, log_probs = zip(*(_sample(*block, sampling) for block in blocks), strict=True)
    return torch.cat(tokens), torch.cat(log_probs)


def _sample(logits_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    logits_nV = logits_nV.double()
    if sampling.temperature == 0:
        tokens_n = logits_nV.argmax(-1)
    else:
        scores_nV = filtered(logits_nV / sampling.temperature, sampling.top_k, sampling.top_p)
        tokens_n = (scores_nV + gumbel_noise(seeds_n, positions_n, logits_nV.shape[1])).argmax(-1)
    log_probs_n = logits_nV.gather(1, tokens_n[:, None])[:, 0] - logits_nV.logsumexp(-1)
    return tokens_n, log_probs_n


def filtered(scores_nV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """-inf where top-k and then top-p, over what top-k has left, rule a token out; ties with the k-th stay."""
    if top_k and top_k < scores_nV.shape[1]:
        kth = scores_nV.topk(top_k).values[:, -1:]
        scores_nV = scores_nV.masked_fill(scores_nV < kth, -math.inf)
    if top_p < 1:
        ordered, order = scores_nV.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        ruled_out = mass_before >= top_p
        ruled_out[:, 0] = False  # the most likely token always stays
        scores_nV = scores_nV.masked_fill(ruled_out.scatter(1, order, ruled_out), -math.inf)
    return scores_nV


_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants (Steele, Lea and Flood 2014), as int64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def gumbel_noise(seeds_n: Tensor, positions_n: Tensor, vocab_size: int) -> Tensor:
    """fp64 [n, V] of standard Gumbel noise: row i is SplitMix64's stream of a key made of its seed and position."""
    keys_n = _mix(_mix(seeds_n + _GOLDEN) + (positions_n + 1) * _GOLDEN)
    counters_V = torch.arange(1, vocab_size + 1, device=seeds_n.device) * _GOLDEN
    # 52 bits and a half, so that neither 0 nor 1 comes out.
    uniform_nV = (_shift_right(_mix(keys_n[:, None] + counters_V), 12).double() + 0.5) * 2.0**-52
    return -(-uniform_nV.log()).log()


def as_int64(seed: int) -> int:
    """Any integer, folded into the range of an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer; int64 products wrap around."""
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Of an int64 as if it were unsigned: zeros come in from the left."""
    return (x >> bits) & (2 ** (64 - bits) - 1)

"""The oracle of the engine's sampling: the same draw from logits of the whole vocabulary.

With filters by sorting all of them and with noise for all; without, an id of a block that is drawn before.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron.blocks import BLOCK_SIZE
from megatron_gkd.rollout.megatron.noise import FIRST_BLOCK_PLACE, gumbel_noise


def sample_gathered(
    logits_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling, is_seen_nV: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    logits_nV = logits_nV.double()
    scores_nV = logits_nV.clone()
    if is_seen_nV is not None:
        scores_nV[is_seen_nV & (logits_nV > 0)] /= sampling.repetition_penalty
        scores_nV[is_seen_nV & (logits_nV < 0)] *= sampling.repetition_penalty
    scores_nV[:, [one for one in sampling.reserved_ids if one < logits_nV.shape[1]]] = -math.inf
    if sampling.temperature == 0:
        tokens_n = scores_nV.argmax(-1)
    else:
        scores_nV = filter_scores(scores_nV / sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        if not (sampling.top_k or sampling.min_p or sampling.top_p < 1):
            scores_nV = keep_one_block(scores_nV, seeds_n, positions_n)
        tokens_n = (scores_nV + gumbel_noise(seeds_n, positions_n, torch.arange(logits_nV.shape[1]))).argmax(-1)
    log_probs_n = logits_nV.gather(1, tokens_n[:, None])[:, 0] - logits_nV.logsumexp(-1)
    return tokens_n, log_probs_n


def keep_one_block(scores_nV: Tensor, seeds_n: Tensor, positions_n: Tensor) -> Tensor:
    """-inf outside of a block of ids that is drawn by its probability."""
    blocks = scores_nV.split(BLOCK_SIZE, dim=1)
    log_masses = torch.stack([block.logsumexp(-1) for block in blocks], -1)
    noise = gumbel_noise(seeds_n, positions_n, FIRST_BLOCK_PLACE + torch.arange(len(blocks)))
    chosen_n = (log_masses + noise).argmax(-1)
    is_in_it = torch.arange(scores_nV.shape[1]) // BLOCK_SIZE == chosen_n[:, None]
    return scores_nV.masked_fill(~is_in_it, -math.inf)


def filter_scores(scores_nV: Tensor, top_k: int | None, top_p: float, min_p: float = 0.0) -> Tensor:
    """-inf where min-p, top-k, or top-p over what these have left, exclude a token; ties with the k-th stay."""
    is_unlikely = scores_nV.softmax(-1) < min_p * scores_nV.softmax(-1).amax(-1, keepdim=True)
    scores_nV = scores_nV.masked_fill(is_unlikely, -math.inf)
    if top_k and top_k < scores_nV.shape[1]:
        kth = scores_nV.topk(top_k).values[:, -1:]
        scores_nV = scores_nV.masked_fill(scores_nV < kth, -math.inf)
    if top_p < 1:
        ordered, order = scores_nV.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.softmax(-1)
        mass_before = probabilities.cumsum(-1) - probabilities
        is_excluded = mass_before >= top_p
        is_excluded[:, 0] = False  # the most likely token always stays
        scores_nV = scores_nV.masked_fill(torch.zeros_like(is_excluded).scatter(1, order, is_excluded), -math.inf)
    return scores_nV

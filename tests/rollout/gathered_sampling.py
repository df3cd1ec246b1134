"""The oracle of the engine's sampling: the same draw from logits of the whole vocabulary, by sorting all of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_gkd.rollout.base import Sampling
from megatron_gkd.rollout.megatron.sampling import gumbel_noise


def sample_gathered(
    logits_nV: Tensor, seeds_n: Tensor, positions_n: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    logits_nV = logits_nV.double()
    scores_nV = logits_nV.clone()
    scores_nV[:, [one for one in sampling.reserved_ids if one < logits_nV.shape[1]]] = -math.inf
    if sampling.temperature == 0:
        tokens_n = scores_nV.argmax(-1)
    else:
        scores_nV = filter_scores(scores_nV / sampling.temperature, sampling.top_k, sampling.top_p)
        tokens_n = (scores_nV + gumbel_noise(seeds_n, positions_n, 0, logits_nV.shape[1])).argmax(-1)
    log_probs_n = logits_nV.gather(1, tokens_n[:, None])[:, 0] - logits_nV.logsumexp(-1)
    return tokens_n, log_probs_n


def filter_scores(scores_nV: Tensor, top_k: int | None, top_p: float) -> Tensor:
    """-inf where top-k, and then top-p over what top-k has left, exclude a token; ties with the k-th stay."""
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

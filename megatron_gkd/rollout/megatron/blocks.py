"""Draws from the whole vocabulary in two stages: a block of ids by its probability, then an id of that block.

This is a draw from the same distribution, and needs random numbers and their logarithms for the blocks and for one
block's ids, not for all ids: at a vocabulary of 151,936 for 850 numbers a row. Blocks are of ids, so that shards of
the vocabulary may begin within one.

Shape suffixes: n rows, V this rank's columns, R ranks, b this rank's blocks, a all blocks, B ids of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.rollout.megatron.noise import FIRST_BLOCK_PLACE, gumbel_noise

BLOCK_SIZE = 256


@dataclass(frozen=True)
class BlockSums:
    """Sums of exponentials of scores, for each block of ids that this rank has a part of.

    Attributes:
        largest_n: fp64, each row's largest score here; 0 where that is not finite.
        sums_nb: fp64, of exp(score - largest) over each block.
    """

    largest_n: Tensor
    sums_nb: Tensor

    @classmethod
    def from_scores(cls, scores_nV: Tensor, shard: VocabShard) -> BlockSums:
        """Compute the sums of fp32 or fp64 scores. Every rank has as many blocks, of which the last may be empty."""
        num_rows, num_columns = scores_nV.shape
        num_blocks = shard.width // BLOCK_SIZE + 2
        start = shard.first % BLOCK_SIZE
        largest_n = scores_nV.amax(-1)
        largest_n = torch.where(largest_n.isfinite(), largest_n, 0.0)
        padded = scores_nV.new_empty(num_rows, num_blocks * BLOCK_SIZE)
        padded[:, :start] = 0.0
        padded[:, start + num_columns :] = 0.0
        torch.sub(scores_nV, largest_n[:, None], out=padded[:, start : start + num_columns]).exp_()
        sums_nb = padded.view(num_rows, num_blocks, BLOCK_SIZE).sum(-1)
        return cls(largest_n.double(), sums_nb.double())

    def logsumexp(self) -> Tensor:
        """Return the logarithm of the sum of this rank's exponentials, fp64 [n]."""
        return self.largest_n + self.sums_nb.sum(-1).log()

    def gather(self, shard: VocabShard) -> Tensor:
        """Return the probabilities of all blocks, up to a factor a row, fp64 [n, a]: the same on every rank."""
        gathered = shard.gather(torch.cat([self.largest_n[:, None], self.sums_nb], -1))
        largest_Rn1, sums_Rnb = gathered[..., :1], gathered[..., 1:]
        # A rank without probability must not set the scale: the others' scores may be far below its 0.
        largest_Rn1 = largest_Rn1.masked_fill((sums_Rnb == 0).all(-1, keepdim=True), -torch.inf)
        sums_Rnb = sums_Rnb * (largest_Rn1 - largest_Rn1.amax(0)).exp()
        num_ranks, num_rows, num_local = sums_Rnb.shape
        firsts = [rank * shard.width // BLOCK_SIZE for rank in range(num_ranks)]
        weights_na = sums_Rnb.new_zeros(num_rows, firsts[-1] + num_local)
        for first, sums_nb in zip(firsts, sums_Rnb, strict=True):
            weights_na[:, first : first + num_local] += sums_nb
        return weights_na


def draw_by_blocks(
    scores_nV: Tensor, sums: BlockSums, seeds_n: Tensor, positions_n: Tensor, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """Draw a block of each row, and find the best of this rank's columns in it.

    Args:
        scores_nV: log-probabilities up to a constant; -inf may not be drawn.
        sums: of these scores.
        seeds_n: int64, one a row.
        positions_n: int64, of the token that is drawn.
        shard: the columns of this rank.

    Returns:
        Scores with noise, fp64 [n], of which the largest over the ranks is the draw, and their columns, int64 [n].
    """
    weights_na = sums.gather(shard)
    places_a = torch.arange(weights_na.shape[1], device=weights_na.device) + FIRST_BLOCK_PLACE
    block_n1 = (weights_na.log() + gumbel_noise(seeds_n, positions_n, places_a)).argmax(-1, keepdim=True)
    ids_nB = block_n1 * BLOCK_SIZE + torch.arange(BLOCK_SIZE, device=weights_na.device)
    columns_nB = ids_nB - shard.first
    is_here_nB = (columns_nB >= 0) & (columns_nB < scores_nV.shape[1])
    columns_nB = columns_nB.clamp(0, scores_nV.shape[1] - 1)
    noisy_nB = scores_nV.gather(1, columns_nB).double() + gumbel_noise(seeds_n, positions_n, ids_nB)
    noisy_nB = torch.where(is_here_nB, noisy_nB, -torch.inf)
    best_n1 = noisy_nB.argmax(-1, keepdim=True)
    return noisy_nB.gather(1, best_n1)[:, 0], columns_nB.gather(1, best_n1)[:, 0]

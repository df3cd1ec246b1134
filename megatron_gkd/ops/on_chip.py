"""The loss of tokens whose logits a GPU reads only once: statistics, sums and gradient by one kernel.

Three passes read both models' logits three times and write the gradient, 7 times the bytes of one tensor of logits;
here it is 3 times. It needs rows that fit into the shared memory of a few multiprocessors, and no collective between
the passes. Whether it is faster has not been measured, so it has to be switched on; see ``passes``.
"""

from __future__ import annotations

from megatron_gkd.ops import passes
from megatron_gkd.ops.combine import combine_statistics, combine_sums
from megatron_gkd.ops.params import ChunkTargets, Logits, LossWeights, TokenResults
from megatron_gkd.ops.spec import ShardSpec


def compute_on_chip(logits: Logits, spec: ShardSpec, results: TokenResults, targets: ChunkTargets) -> bool:
    """Write the results and, over the student's logits, the gradient; return False, with nothing done, if impossible.

    Args:
        logits: of both models.
        spec: the divergence and the shard.
        results: are overwritten.
        targets: labels and weights; there must be weights.
    """
    if not passes.uses_clusters():
        return False
    scaled = targets.scaled()
    assert scaled.token_weights is not None, "a gradient needs weights"
    weights = LossWeights(scaled.token_weights, scaled.label_weights)
    found = passes.loss(logits.student, logits, targets.labels, weights, spec)
    if found is None:
        return False
    combine_statistics(found.statistics[None], spec, targets, results, has_teacher=True)
    if spec.needs_sums:
        combine_sums(found.sums[None], targets, results)
    return True

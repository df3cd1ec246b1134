"""The arguments and results of the passes over a top-k, which ``csrc/top_k.h`` mirrors. Shape suffixes: N tokens."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megatron_gkd.ops.spec import TopKShardSpec

NUM_SUMS = 7
"""Value, slope, teacher's and student's entropy, forward and reverse KL, top-1 agreement."""
NUM_NORMALIZERS = 8
"""A maximum and a logarithm for: the student, the bucket, the student at temperature 1, the teacher."""


def num_statistics(spec: TopKShardSpec, with_labels: bool) -> int:
    """Return how many statistics each token has: of the k tokens, of the others, and those of the label."""
    if with_labels:
        return 6
    return 4 if spec.has_bucket else 2


class TopKSums(NamedTuple):
    """Hold what ``topk_passes.sums`` returns.

    Attributes:
        normalizers: [N, NUM_NORMALIZERS], over the whole group.
        sums: [N, NUM_SUMS], over this rank's ids; the bucket counts on the first rank. Gathered: [R, N, NUM_SUMS].
        cross_entropy: [N], at temperature 1 over the whole vocabulary; None without labels.
    """

    normalizers: Tensor
    sums: Tensor
    cross_entropy: Tensor | None


class TopKRows(NamedTuple):
    """Hold what the gradient needs of each token beside its logits and top-k, in the dtype of the statistics.

    Attributes:
        normalizers: [N, NUM_NORMALIZERS].
        slope_sum: [N], over the k tokens and the bucket of all ranks.
        weight: [N], the gradient of the loss by each token's divergence.
        labels: int64 [N], global ids; None without a cross-entropy.
        label_weight: [N], the gradient of the loss by each token's cross-entropy.
    """

    normalizers: Tensor
    slope_sum: Tensor
    weight: Tensor
    labels: Tensor | None = None
    label_weight: Tensor | None = None

"""The divergence of each token over the teacher's top-k, and its gradient, from the passes of ``topk_passes``.

The ids are an irregular shard of the vocabulary: each rank reads its own logits at those ids that it owns, and the
ranks exchange numbers per token, never logits. There are two modes for the tokens outside the top-k (``TailMode``):

    renormalize   both distributions are conditioned on the k tokens. The others do not count and get no gradient.
    bucket        the others are one more outcome B, with p_B = sum_{u not in ids} p_u, computed as a log-sum-exp of
                  their logits and never as 1 - sum. The divergence is then at most the full one (data-processing
                  inequality), and mass that the student moves outside the k tokens counts.

Both are the full divergence at k = V. With the slopes of ``reference.Divergence``, summed over the k (+ 1) outcomes,

    ∂D/∂z_j = (slope_j - p_j sum_u slope_u) / temperature                      for j in ids
    ∂D/∂z_j = (p_j / p_B) (slope_B - p_B sum_u slope_u) / temperature          for other j, with the bucket

The cross-entropy over the whole vocabulary at temperature 1 comes from the same passes. Shape suffixes: N tokens, k ids
of each, V valid columns of this rank's shard. Logits are of any float dtype; results are in fp32 (fp64 for fp64 student
logits).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.ops import topk_passes
from megatron_gkd.ops.spec import TopKShardSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_rows import TopKRows, TopKSums
from megatron_gkd.ops.torch_topk_passes import add_ranks


class TopKForward(NamedTuple):
    """Hold sums over the k tokens and the bucket of the distributions at the temperature of the loss.

    Attributes:
        normalizers: [N, 8], of both models, for the gradient.
        cross_entropy: [N], of the student at temperature 1 over the whole vocabulary, in nats; None without labels.
        divergence: [N], in nats, like all below.
        slope_sum: [N].
        teacher_entropy: [N].
        student_entropy: [N].
        forward_kl: [N], KL(T||S).
        reverse_kl: [N], KL(S||T).
        top1_agreement: [N], 1.0 where a most likely token of the teacher is a most likely one of the student: among the
            k tokens, or with the bucket among all.
    """

    normalizers: Tensor
    cross_entropy: Tensor | None
    divergence: Tensor
    slope_sum: Tensor
    teacher_entropy: Tensor
    student_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agreement: Tensor

    def gradient_rows(
        self, weight: Tensor, labels: Tensor | None = None, label_weight: Tensor | None = None
    ) -> TopKRows:
        """Return the rows of the gradient of sum_n (weight[n] D_n + label_weight[n] CE_n)."""
        return TopKRows(self.normalizers, self.slope_sum, weight, labels, label_weight)


def compute_topk_forward(
    student_NV: Tensor,
    topk: TopK,
    spec: TopKShardSpec,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
) -> TopKForward:
    """Compute everything but the gradient, with the same bits on every rank of the group. Two collectives.

    Args:
        student_NV: this rank's valid columns.
        topk: flat, [N, k].
        spec: the divergence, the shard and the tail mode.
        labels: int64 [N], global ids, for the cross-entropy.
        mask: bool [N]; sums are 0 where it is False.

    Raises:
        ValueError: the tail mode is "bucket", and `topk` has no tail at its temperature.
    """
    found = gather_topk_sums(student_NV, topk, spec, labels)
    sums = add_ranks(found.sums)
    sums = sums if mask is None else torch.where(mask[:, None], sums, 0)
    return TopKForward(found.normalizers, found.cross_entropy, *sums.unbind(-1))


def gather_topk_sums(student_NV: Tensor, topk: TopK, spec: TopKShardSpec, labels: Tensor | None) -> TopKSums:
    """Return the normalizers, the sums of all ranks [R, N, ...] and the cross-entropy. Two collectives.

    Raises:
        ValueError: as ``compute_topk_forward``.
    """
    check_tail(topk, spec)
    statistics = spec.shard.gather(topk_passes.statistics(student_NV, topk, labels, spec))
    local = topk_passes.sums(student_NV, topk, statistics, labels, spec)
    return local._replace(sums=spec.shard.gather(local.sums))


def check_tail(topk: TopK, spec: TopKShardSpec) -> None:
    """Raise ValueError if the tail mode is "bucket", and `topk` has no tail at its temperature."""
    if not spec.has_bucket:
        return
    if topk.tail is None:
        raise ValueError("tail_mode = 'bucket': this TopK has no tail, which is the teacher's mass outside its top-k")
    if topk.temperature != spec.temperature:
        raise ValueError(
            f"tail_mode = 'bucket': the temperature is {spec.temperature}, but the tail of this TopK is of temperature "
            f"{topk.temperature}; they must be equal, as the mass outside a top-k at one temperature does not follow "
            "from that at another, and log-probabilities of the top-k give it at temperature 1 only"
        )

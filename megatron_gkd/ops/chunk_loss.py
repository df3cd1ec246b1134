"""The loss of one chunk of tokens from their logits: metrics of each token, and the gradient by the student's logits.

One function for each kind of teacher: its logits, its top-k, or none. Shape suffixes: n tokens of the chunk, V valid
columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from torch import Tensor

from megatron_gkd.ops import passes, topk_passes
from megatron_gkd.ops.forward import compute_forward, compute_student_forward
from megatron_gkd.ops.on_chip import compute_on_chip
from megatron_gkd.ops.params import ChunkTargets, Logits, TokenResults
from megatron_gkd.ops.spec import ShardSpec, TopKShardSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_statistics import gather_topk_sums


def compute_full_loss(
    student_nV: Tensor,
    teacher_nV: Tensor,
    targets: ChunkTargets,
    results: TokenResults,
    spec: ShardSpec,
    needs_gradient: bool,
) -> None:
    """Compare with the teacher's logits. With `needs_gradient`, the gradient overwrites the student's logits."""
    logits = Logits(student_nV, teacher_nV)
    if needs_gradient and compute_on_chip(logits, spec, results, targets):
        return
    found = compute_forward(logits, spec, results, targets)
    if needs_gradient:
        labels = None if targets.label_weights is None else found.labels
        passes.gradient(student_nV, logits, found.divergence_rows(), labels, spec)


def compute_student_loss(
    student_nV: Tensor, targets: ChunkTargets, results: TokenResults, spec: ShardSpec, needs_gradient: bool
) -> None:
    """Compute the cross-entropy without a teacher. With `needs_gradient`, its gradient overwrites the logits."""
    labels = compute_student_forward(student_nV, spec, results, targets)
    if not needs_gradient:
        return
    if labels is None or targets.label_weights is None:
        student_nV.zero_()
    else:
        passes.cross_entropy_gradient(student_nV, student_nV, labels, spec.softcap)


def compute_topk_loss(
    student_nV: Tensor,
    topk: TopK,
    targets: ChunkTargets,
    results: TokenResults,
    spec: TopKShardSpec,
    needs_gradient: bool,
) -> None:
    """Compare with the teacher's top-k, and compute the cross-entropy over the whole vocabulary.

    With `needs_gradient`, the gradient overwrites the student's logits.
    """
    sums = gather_topk_sums(student_nV, topk, spec, targets.labels)
    rows = topk_passes.combine(sums, targets, results)
    if needs_gradient:
        topk_passes.gradient(student_nV, student_nV, topk, rows, spec)

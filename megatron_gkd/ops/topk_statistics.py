"""The passes of which the divergence over the teacher's top-k tokens consists, in plain torch.

The ids are an irregular shard of the vocabulary: each rank reads its own logits at those ids that it owns, and the
ranks exchange numbers per token, never logits. There are two modes for the tokens outside the top-k (``TailMode``):

    renormalize   both distributions are conditioned on the k tokens. The others do not count and get no gradient.
    bucket        the others are one more outcome B, with p_B = sum_{u not in ids} p_u, computed as a log-sum-exp of
                  their logits and never as 1 - sum. The divergence is then at most the full one (data-processing
                  inequality), and mass that the student moves outside the k tokens counts.

Both are the full divergence at k = V. With the slopes of ``reference.Divergence``, summed over the k (+ 1) outcomes,

    ∂D/∂z_j = (slope_j - p_j sum_u slope_u) / temperature                      for j in ids
    ∂D/∂z_j = (p_j / p_B) (slope_B - p_B sum_u slope_u) / temperature          for other j, with the bucket

Shape suffixes: N tokens, k ids of each, V valid columns of this rank's shard, R ranks of its group, P parts of the
vocabulary (the k tokens; with the bucket also the others); n rows of a block. Logits are of any float dtype; arithmetic
and results are in fp32 (fp64 for fp64 student logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.ops.pointwise import pointwise, softcap_slope, weighted
from megatron_gkd.ops.reference import FORWARD_KL, REVERSE_KL
from megatron_gkd.ops.spec import TopKShardSpec, accumulate_dtype
from megatron_gkd.ops.topk import TopK, finite, max_and_sum, row_blocks

_forward_kl, _reverse_kl = pointwise(FORWARD_KL), pointwise(REVERSE_KL)


class LogSum(NamedTuple):
    """Hold ln sum_u exp(z_u / temperature), of some logits z of each token, as maximum / temperature + log.

    The two are not added up, so that large logits lose no digits. They are -inf and 0 of no logits, or of -inf only.

    Attributes:
        maximum: [N], in logits.
        log: [N], >= 0.
    """

    maximum: Tensor
    log: Tensor

    def log_shares(self, z: Tensor, rows: slice, temperature: float) -> Tensor:
        """Return ln of the shares in the sum, [n, ...], of logits `z` of the `rows`."""
        return (z - finite(self.maximum[rows])[:, None]) / temperature - self.log[rows, None]


class TopKNormalizers(NamedTuple):
    """Hold what turns the student's logits into log-probabilities, over the whole group.

    Attributes:
        student: over the k tokens; with the bucket over the whole vocabulary.
        others: over the bucket's tokens; None without a bucket.
    """

    student: LogSum
    others: LogSum | None

    def bucket_log_prob(self, others: LogSum, rows: slice, temperature: float) -> Tensor:
        """Return ln p_B, [n, 1]."""
        return self.student.log_shares(others.maximum[rows, None], rows, temperature) + others.log[rows, None]


class TopKRows(NamedTuple):
    """Hold what the gradient needs of each token beside its logits and top-k.

    Attributes:
        normalizers: of the student.
        slope_sum: [N], over the k tokens and the bucket.
        weight: [N], the gradient of the loss by each token's divergence.
    """

    normalizers: TopKNormalizers
    slope_sum: Tensor
    weight: Tensor


class TopKForward(NamedTuple):
    """Hold sums over the k tokens and the bucket of the distributions at the temperature of the loss.

    Attributes:
        normalizers: of the student.
        divergence: [N], in nats, like all below.
        slope_sum: [N].
        student_entropy: [N].
        teacher_entropy: [N].
        forward_kl: [N], KL(T||S).
        reverse_kl: [N], KL(S||T).
        top1_agreement: [N], 1.0 where a most likely token of the teacher is a most likely one of the student: among the
            k tokens, or with the bucket among all.
    """

    normalizers: TopKNormalizers
    divergence: Tensor
    slope_sum: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    forward_kl: Tensor
    reverse_kl: Tensor
    top1_agreement: Tensor

    def gradient_rows(self, weight: Tensor) -> TopKRows:
        """Return the rows of the gradient of sum_n weight[n] D_n."""
        return TopKRows(self.normalizers, self.slope_sum, weight)


_NUM_SUMS = len(TopKForward._fields) - 1


def compute_topk_forward(
    student_NV: Tensor, topk: TopK, spec: TopKShardSpec, *, mask: Tensor | None = None
) -> TopKForward:
    """Compute everything but the gradient, with the same bits on every rank of the group. Two collectives.

    Args:
        student_NV: this rank's valid columns.
        topk: flat, [N, k].
        spec: the divergence, the shard and the tail mode.
        mask: bool [N]; sums are 0 where it is False.

    Raises:
        ValueError: the tail mode is "bucket", and `topk` has no tail at its temperature.
    """
    _check_tail(topk, spec)
    normalizers = _combine(spec.shard.gather(_local_log_sums(student_NV, topk, spec)), spec)
    sums = spec.shard.gather(_local_sums(student_NV, topk, normalizers, spec)).sum(0)
    sums[:, -1].clamp_(max=1)  # several ranks may have a most likely token
    sums = sums if mask is None else torch.where(mask[:, None], sums, 0)
    return TopKForward(normalizers, *sums.unbind(-1))


def _check_tail(topk: TopK, spec: TopKShardSpec) -> None:
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


def write_topk_gradient(out: Tensor, student_NV: Tensor, topk: TopK, rows: TopKRows, spec: TopKShardSpec) -> None:
    """Write the gradient of sum_n rows.weight[n] D_n by the student's logits into `out`.

    Args:
        out: [N, >= V], which may be the logits themselves. Rows of weight 0 become 0, whatever their logits hold, and
            so do columns from V on.
        student_NV: this rank's valid columns.
        topk: flat, [N, k].
        rows: in the dtype of the statistics.
        spec: the divergence, the shard, the softcap and the tail mode.
    """
    valid, normalizers = spec.shard.valid, rows.normalizers
    out[:, valid:] = 0
    for block in _blocks(student_NV, topk, spec) if valid else ():
        own = _Own.from_logits(student_NV[block], topk.ids[block], spec, rows.slope_sum.dtype)
        a = normalizers.student.log_shares(own.logits, block, spec.temperature)
        teacher = _teacher_log_probs(topk[block], spec, rows.slope_sum.dtype)
        factor, slopes = rows.weight[block, None] / spec.temperature, rows.slope_sum[block, None]
        gradient = _softmax_gradient(a, teacher.tokens, slopes, spec) * factor * _softcap_slope(own.logits, spec)
        gradient = torch.where(own.here & (factor != 0), gradient, 0).to(out.dtype)
        if normalizers.others is not None and teacher.bucket is not None:
            bucket_a = normalizers.bucket_log_prob(normalizers.others, block, spec.temperature)
            bucket = _softmax_gradient(bucket_a, teacher.bucket, slopes, spec)
            others = _without(student_NV[block], own)
            shares = normalizers.others.log_shares(others, block, spec.temperature).exp()
            by_others = shares * (bucket * factor) * _softcap_slope(others, spec)
            out[block, :valid] = torch.where(factor == 0, 0, by_others)
        else:
            out[block, :valid] = 0
        out[block].scatter_add_(1, own.columns, gradient)  # adds to zeros: at the ids the shares in the bucket are 0


def _softmax_gradient(a: Tensor, b: Tensor, slope_sum: Tensor, spec: TopKShardSpec) -> Tensor:
    """Return slope - p sum_u slope_u."""
    p = a.exp()
    _, slope = pointwise(spec.base.divergence)(a, b, p, b.exp(), spec.base.beta)
    return slope - p * slope_sum


def _softcap_slope(logits: Tensor, spec: TopKShardSpec) -> Tensor | float:
    softcap = spec.base.softcap
    return 1.0 if softcap is None else softcap_slope(logits, softcap)


class _Own(NamedTuple):
    """Hold what this rank owns of the ids of a block of tokens, each [n, k].

    Attributes:
        here: bool, whether the id is a valid column of this rank.
        columns: int64; 0 where it is not.
        logits: the student's; -inf where it is not.
    """

    here: Tensor
    columns: Tensor
    logits: Tensor

    @classmethod
    def from_logits(cls, student_nV: Tensor, ids: Tensor, spec: TopKShardSpec, dtype: torch.dtype) -> _Own:
        here, columns = spec.shard.owned(ids)
        return cls(here, columns, torch.where(here, student_nV.gather(1, columns).to(dtype), -torch.inf))


def _without(student_nV: Tensor, own: _Own) -> Tensor:
    """Copy the logits, in the dtype of `own.logits`, with -inf at the ids."""
    excluded = torch.zeros_like(own.logits).masked_fill_(own.here, -torch.inf)
    others = student_nV.to(own.logits.dtype, copy=True)
    return others.scatter_add_(1, own.columns, excluded)  # added, because column 0 stands for ids that are elsewhere


def _blocks(student_NV: Tensor, topk: TopK, spec: TopKShardSpec) -> Iterator[slice]:
    k, width = topk.ids.shape[1], student_NV.shape[1]
    return row_blocks(student_NV.shape[0], max(k, width) if spec.has_bucket else k, student_NV.device)


def _local_log_sums(student_NV: Tensor, topk: TopK, spec: TopKShardSpec) -> Tensor:
    """Return ``max_and_sum`` of this shard's logits at the ids, and of its others, [N, P, 2]."""
    dtype = accumulate_dtype(student_NV.dtype)
    pieces = torch.zeros(len(student_NV), 1 + spec.has_bucket, 2, dtype=dtype, device=student_NV.device)
    if not spec.shard.valid:  # all padding: no maximum, no mass
        pieces[..., 0] = -torch.inf
        return pieces
    for block in _blocks(student_NV, topk, spec):
        own = _Own.from_logits(student_NV[block], topk.ids[block], spec, dtype)
        pieces[block, 0, 0], pieces[block, 0, 1] = max_and_sum(own.logits, spec.temperature)
        if spec.has_bucket:
            pieces[block, 1, 0], pieces[block, 1, 1] = max_and_sum(_without(student_NV[block], own), spec.temperature)
    return pieces


def _combine(pieces_RNP2: Tensor, spec: TopKShardSpec) -> TopKNormalizers:
    def log_sum(pieces: Tensor) -> LogSum:
        maxima, sums = pieces.unbind(-1)
        maximum = maxima.amax((0, 2))
        total = (sums * ((maxima - finite(maximum)[:, None]) / spec.temperature).exp()).sum((0, 2))
        return LogSum(maximum, total.clamp(min=1).log())  # the largest logit adds 1, so less than 1 is nothing

    return TopKNormalizers(log_sum(pieces_RNP2), log_sum(pieces_RNP2[:, :, 1:]) if spec.has_bucket else None)


def _local_sums(student_NV: Tensor, topk: TopK, normalizers: TopKNormalizers, spec: TopKShardSpec) -> Tensor:
    """Return this shard's part of the sums of ``TopKForward``, [N, 7] in the order of its fields."""
    maximum = normalizers.student.maximum
    partial = maximum.new_zeros(len(student_NV), _NUM_SUMS)
    if not spec.shard.valid:
        return partial
    for block in _blocks(student_NV, topk, spec):
        own = _Own.from_logits(student_NV[block], topk.ids[block], spec, maximum.dtype)
        a = normalizers.student.log_shares(own.logits, block, spec.temperature)
        teacher = _teacher_log_probs(topk[block], spec, maximum.dtype)
        b = teacher.tokens
        both_best = own.here & (own.logits == maximum[block, None]) & (b == b.amax(-1, keepdim=True))
        partial[block, :-1] = _summed_terms(a, torch.where(own.here, b, -torch.inf), spec)
        partial[block, -1] = both_best.any(-1)
        # The bucket is the same on all ranks, and counts once.
        if normalizers.others is not None and teacher.bucket is not None and spec.shard.first == 0:
            bucket_a = normalizers.bucket_log_prob(normalizers.others, block, spec.temperature)
            partial[block, :-1] += _summed_terms(bucket_a, teacher.bucket, spec)
    return partial


def _summed_terms(a: Tensor, b: Tensor, spec: TopKShardSpec) -> Tensor:
    """Return the sums of ``TopKForward`` but the last, [n, 6], of log-probabilities [n, k]; -inf in both adds 0."""
    p, q = a.exp(), b.exp()
    value, slope = pointwise(spec.base.divergence)(a, b, p, q, spec.base.beta)
    forward_kl, _ = _forward_kl(a, b, p, q, 0.0)
    reverse_kl, _ = _reverse_kl(a, b, p, q, 1.0)
    terms = value, slope, -weighted(p, a), -weighted(q, b), forward_kl, reverse_kl
    return torch.stack([term.sum(-1) for term in terms], -1)


class _TeacherLogProbs(NamedTuple):
    """Hold the teacher's log-probabilities at the temperature of the loss.

    Attributes:
        tokens: [n, k]; -inf where the entry is missing.
        bucket: [n, 1]; None without a bucket.
    """

    tokens: Tensor
    bucket: Tensor | None


def _teacher_log_probs(topk: TopK, spec: TopKShardSpec, dtype: torch.dtype) -> _TeacherLogProbs:
    present = (topk.ids >= 0) & (topk.ids < spec.shard.vocab_size)
    weights = torch.where(present, topk.values.to(dtype) / spec.temperature, -torch.inf)
    if not spec.has_bucket or topk.tail is None:
        return _TeacherLogProbs(_log_softmax(weights), None)
    # Where no token is left for the bucket, the tail holds rounding errors only.
    tail = torch.where(present.sum(-1) == spec.shard.vocab_size, -torch.inf, topk.tail.to(dtype))
    both = _log_softmax(torch.cat([weights, tail[:, None]], -1))
    return _TeacherLogProbs(both[:, :-1], both[:, -1:])


def _log_softmax(weights: Tensor) -> Tensor:
    """Return the log-softmax over the last dimension; -inf throughout where all weights are -inf."""
    maximum = finite(weights.amax(-1, keepdim=True))
    shifted = weights - maximum
    return shifted - shifted.exp().sum(-1, keepdim=True).clamp(min=1).log()

"""The passes over a top-k in plain torch: for fp64, and where no kernels are compiled.

Inputs and outputs are those of the kernels; see ``csrc/top_k.h``. Shape suffixes: N tokens, n of a block, k ids of
each, V valid columns of this rank's vocabulary shard, R ranks of its group. Logits are of any float dtype; arithmetic
and results are in fp32 (fp64 for fp64 student logits).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_gkd.data.sample import IGNORED_LABEL
from megatron_gkd.ops.params import ChunkTargets, TokenResults
from megatron_gkd.ops.pointwise import pointwise, softcap_slope, weighted
from megatron_gkd.ops.reference import FORWARD_KL, REVERSE_KL
from megatron_gkd.ops.spec import TopKShardSpec, accumulate_dtype
from megatron_gkd.ops.topk import TopK, finite, max_and_sum, row_blocks
from megatron_gkd.ops.topk_rows import NUM_SUMS, TopKRows, TopKSums, num_statistics

_forward_kl, _reverse_kl = pointwise(FORWARD_KL), pointwise(REVERSE_KL)


class _LogSum(NamedTuple):
    """Hold ln sum_u exp(z_u / temperature) of some logits z of each token, [N], as maximum / temperature + log.

    The two are not added up, so that large logits lose no digits. They are -inf and 0 of no logits, or of -inf only.
    """

    maximum: Tensor
    log: Tensor

    @classmethod
    def from_parts(cls, maxima_RNP: Tensor, sums_RNP: Tensor, temperature: float) -> _LogSum:
        maximum = maxima_RNP.amax((0, 2))
        shrink = ((maxima_RNP - finite(maximum)[:, None]) / temperature).exp()
        total = weighted(sums_RNP, shrink).sum((0, 2))
        return cls(maximum, total.clamp(min=1).log())  # the largest logit adds 1, so less than 1 is nothing

    def log_shares(self, z: Tensor, rows: slice, temperature: float) -> Tensor:
        """Return ln of the shares in the sum, [n, ...], of logits `z` of the `rows`."""
        return (z - finite(self.maximum[rows])[:, None]) / temperature - self.log[rows, None]


class _Normalizers(NamedTuple):
    """Hold the columns of `normalizers`, two each; the last as ln(sum of the teacher's exponentials)."""

    student: _LogSum
    others: _LogSum
    untempered: _LogSum
    teacher: _LogSum

    @classmethod
    def unpack(cls, normalizers_N8: Tensor) -> _Normalizers:
        columns = normalizers_N8.unbind(-1)
        return cls(*(_LogSum(*columns[i : i + 2]) for i in range(0, 8, 2)))

    def bucket_log_prob(self, rows: slice, temperature: float) -> Tensor:
        """Return ln p_B of the student, [n, 1]."""
        return self.student.log_shares(self.others.maximum[rows, None], rows, temperature) + self.others.log[rows, None]


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

    def without(self, student_nV: Tensor) -> Tensor:
        """Copy the logits, in the dtype of `logits`, with -inf at the ids."""
        excluded = torch.zeros_like(self.logits).masked_fill_(self.here, -torch.inf)
        others = student_nV.to(self.logits.dtype, copy=True)
        return others.scatter_add_(1, self.columns, excluded)  # added, as column 0 stands for ids that are elsewhere


def _blocks(student_NV: Tensor, topk: TopK, *, whole_rows: bool) -> Iterator[slice]:
    k, width = topk.ids.shape[1], student_NV.shape[1]
    return row_blocks(student_NV.shape[0], max(k, width) if whole_rows else k, student_NV.device)


def statistics(student_NV: Tensor, topk: TopK, labels: Tensor | None, spec: TopKShardSpec) -> Tensor:
    """Compute ``topk_passes.statistics`` in plain torch."""
    dtype, columns = accumulate_dtype(student_NV.dtype), num_statistics(spec, labels is not None)
    out = torch.zeros(len(student_NV), columns, dtype=dtype, device=student_NV.device)
    if not spec.shard.valid:  # all padding: no maximum, no mass
        out[:, [0, 2, 5][: columns // 2]] = -torch.inf
        return out
    for block in _blocks(student_NV, topk, whole_rows=columns > 2):
        own = _Own.from_logits(student_NV[block], topk.ids[block], spec, dtype)
        out[block, 0], out[block, 1] = max_and_sum(own.logits, spec.temperature)
        if columns > 2:
            out[block, 2], out[block, 3] = max_and_sum(own.without(student_NV[block]), spec.temperature)
        if labels is not None:
            largest = torch.maximum(out[block, 0], out[block, 2])
            out[block, 4] = (student_NV[block].to(dtype) - finite(largest)[:, None]).exp().sum(-1)
            here, column = spec.shard.owned(labels[block])
            label_logit = student_NV[block].gather(1, column[:, None])[:, 0].to(dtype)
            out[block, 5] = torch.where(here, label_logit, -torch.inf)
    return out


def sums(student_NV: Tensor, topk: TopK, gathered_RNC: Tensor, labels: Tensor | None, spec: TopKShardSpec) -> TopKSums:
    """Compute ``topk_passes.sums`` in plain torch."""
    dtype, temperature = gathered_RNC.dtype, spec.temperature
    maxima, parts = gathered_RNC[..., 0:4:2], gathered_RNC[..., 1:4:2]
    nothing = _LogSum(torch.zeros_like(maxima[0, :, 0]), torch.zeros_like(maxima[0, :, 0]))
    outcomes = slice(None) if spec.has_bucket else slice(1)
    student = _LogSum.from_parts(maxima[..., outcomes], parts[..., outcomes], temperature)
    others = _LogSum.from_parts(maxima[..., 1:], parts[..., 1:], temperature) if spec.has_bucket else nothing
    untempered, cross_entropy = nothing, None
    if labels is not None:
        untempered = _LogSum.from_parts(maxima.amax(-1, keepdim=True), gathered_RNC[..., 4:5], 1.0)
        label_log_prob = untempered.log_shares(gathered_RNC[..., 5].amax(0)[:, None], slice(None), 1.0)[:, 0]
        cross_entropy = torch.where(labels == IGNORED_LABEL, 0, -label_log_prob)
    teacher = _teacher_log_sum(topk, spec, dtype)
    columns = [x for one in (student, others, untempered, teacher) for x in one]
    normalizers = _Normalizers(student, others, untempered, teacher)
    return TopKSums(torch.stack(columns, -1), _local_sums(student_NV, topk, normalizers, spec), cross_entropy)


def _local_sums(student_NV: Tensor, topk: TopK, normalizers: _Normalizers, spec: TopKShardSpec) -> Tensor:
    maximum = normalizers.student.maximum
    partial = maximum.new_zeros(len(student_NV), NUM_SUMS)
    if not spec.shard.valid:
        return partial
    for block in _blocks(student_NV, topk, whole_rows=False):
        own = _Own.from_logits(student_NV[block], topk.ids[block], spec, maximum.dtype)
        a = normalizers.student.log_shares(own.logits, block, spec.temperature)
        teacher = _teacher_log_probs(topk[block], normalizers.teacher, block, spec, maximum.dtype)
        b = teacher.tokens
        both_best = own.here & (own.logits == maximum[block, None]) & (b == b.amax(-1, keepdim=True))
        partial[block, :-1] = _summed_terms(a, torch.where(own.here, b, -torch.inf), spec)
        partial[block, -1] = both_best.any(-1)
        if teacher.bucket is not None and spec.shard.first == 0:  # it is the same on all ranks, and counts once
            bucket_a = normalizers.bucket_log_prob(block, spec.temperature)
            partial[block, :-1] += _summed_terms(bucket_a, teacher.bucket, spec)
    return partial


def _summed_terms(a: Tensor, b: Tensor, spec: TopKShardSpec) -> Tensor:
    """Return all sums but the last, [n, 6], of log-probabilities [n, k]; -inf in both adds 0."""
    p, q = a.exp(), b.exp()
    value, slope = pointwise(spec.base.divergence)(a, b, p, q, spec.base.beta)
    forward_kl, _ = _forward_kl(a, b, p, q, 0.0)
    reverse_kl, _ = _reverse_kl(a, b, p, q, 1.0)
    terms = value, slope, -weighted(q, b), -weighted(p, a), forward_kl, reverse_kl
    return torch.stack([term.sum(-1) for term in terms], -1)


def add_ranks(sums_RN7: Tensor) -> Tensor:
    """Return the sums over all ranks, [N, NUM_SUMS]."""
    if len(sums_RN7) == 1:
        return sums_RN7[0]
    sums = sums_RN7.sum(0)
    sums[:, -1].clamp_(max=1)  # several ranks may have a most likely token
    return sums


def combine(found: TopKSums, targets: ChunkTargets, results: TokenResults) -> TopKRows:
    """Compute ``topk_passes.combine`` in plain torch."""
    assert targets.token_weights is not None and results.losses is not None, "a chunk has a loss"
    sums = add_ranks(found.sums)
    results.metrics.copy_(sums)
    per_token = results.per_token
    losses, label_weight = weighted(targets.token_weights, sums[:, 0]), None
    if found.cross_entropy is None:
        per_token.cross_entropy.zero_()
    else:
        per_token.cross_entropy.copy_(found.cross_entropy)
        if targets.label_weights is not None and targets.labels is not None:
            label_weight = torch.where(targets.labels == IGNORED_LABEL, 0, targets.label_weights)
            losses = losses + weighted(label_weight, found.cross_entropy)
    results.losses.copy_(losses)
    labels = None if label_weight is None else targets.labels
    label_weight = None if label_weight is None else label_weight * targets.factor
    return TopKRows(found.normalizers, sums[:, 1], targets.token_weights * targets.factor, labels, label_weight)


class _TeacherLogProbs(NamedTuple):
    """Hold the teacher's log-probabilities at the temperature of the loss.

    Attributes:
        tokens: [n, k]; -inf where the entry is missing.
        bucket: [n, 1]; None without a bucket.
    """

    tokens: Tensor
    bucket: Tensor | None


def _teacher_weights(topk: TopK, spec: TopKShardSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return ln of the teacher's weights of the tokens [n, k], and of the bucket [n, 1] if there is one."""
    present = (topk.ids >= 0) & (topk.ids < spec.shard.vocab_size)
    tokens = torch.where(present, topk.values.to(dtype) / spec.temperature, -torch.inf)
    if not spec.has_bucket or topk.tail is None:
        return tokens, None
    # Where no token is left for the bucket, the tail holds rounding errors only.
    tail = torch.where(present.sum(-1) == spec.shard.vocab_size, -torch.inf, topk.tail.to(dtype))
    return tokens, tail[:, None]


def _teacher_log_sum(topk: TopK, spec: TopKShardSpec, dtype: torch.dtype) -> _LogSum:
    tokens, bucket = _teacher_weights(topk, spec, dtype)
    weights = tokens if bucket is None else torch.cat([tokens, bucket], -1)
    maximum, total = max_and_sum(weights, 1.0)
    return _LogSum(finite(maximum), total.clamp(min=1).log())


def _teacher_log_probs(
    topk: TopK, log_sum: _LogSum, rows: slice, spec: TopKShardSpec, dtype: torch.dtype
) -> _TeacherLogProbs:
    tokens, bucket = _teacher_weights(topk, spec, dtype)
    log_probs = log_sum.log_shares(tokens, rows, 1.0)
    return _TeacherLogProbs(log_probs, None if bucket is None else log_sum.log_shares(bucket, rows, 1.0))


def gradient(out: Tensor, student_NV: Tensor, topk: TopK, rows: TopKRows, spec: TopKShardSpec) -> None:
    """Compute ``topk_passes.gradient`` in plain torch."""
    valid, temperature, dtype = spec.shard.valid, spec.temperature, rows.slope_sum.dtype
    normalizers = _Normalizers.unpack(rows.normalizers)
    out[:, valid:] = 0
    whole_rows = spec.has_bucket or rows.label_weight is not None
    for block in _blocks(student_NV, topk, whole_rows=whole_rows) if valid else ():
        own = _Own.from_logits(student_NV[block], topk.ids[block], spec, dtype)
        a = normalizers.student.log_shares(own.logits, block, temperature)
        teacher = _teacher_log_probs(topk[block], normalizers.teacher, block, spec, dtype)
        factor, slope_sum = rows.weight[block, None] / temperature, rows.slope_sum[block, None]
        at_ids = _softmax_gradient(a, teacher.tokens, slope_sum, spec) * factor * _softcap_slope(own.logits, spec)
        at_ids = torch.where(own.here & (factor != 0), at_ids, 0)
        total: Tensor | float = 0.0
        if rows.label_weight is not None:
            z = student_NV[block].to(dtype)
            total = _cross_entropy_gradient(z, normalizers.untempered, rows, block, spec)
        if teacher.bucket is not None:
            bucket = _softmax_gradient(normalizers.bucket_log_prob(block, temperature), teacher.bucket, slope_sum, spec)
            others = own.without(student_NV[block])
            shares = normalizers.others.log_shares(others, block, temperature).exp()
            total = total + torch.where(factor == 0, 0, shares * (bucket * factor) * _softcap_slope(others, spec))
        if isinstance(total, Tensor):  # adds to the cross-entropy: at the ids the shares in the bucket are 0
            out[block, :valid] = total.scatter_add_(1, own.columns, at_ids).to(out.dtype)
        else:
            out[block, :valid] = 0
            out[block].scatter_add_(1, own.columns, at_ids.to(out.dtype))


def _softmax_gradient(a: Tensor, b: Tensor, slope_sum: Tensor, spec: TopKShardSpec) -> Tensor:
    """Return slope - p sum_u slope_u."""
    p = a.exp()
    _, slope = pointwise(spec.base.divergence)(a, b, p, b.exp(), spec.base.beta)
    return slope - p * slope_sum


def _cross_entropy_gradient(
    z: Tensor, untempered: _LogSum, rows: TopKRows, block: slice, spec: TopKShardSpec
) -> Tensor:
    assert rows.label_weight is not None and rows.labels is not None
    weight = rows.label_weight[block, None]
    probabilities = untempered.log_shares(z, block, 1.0).exp()
    here, column = spec.shard.owned(rows.labels[block, None])
    gradient = (probabilities * weight).scatter_add_(1, column, torch.where(here, -weight, 0))
    return torch.where(weight == 0, 0, gradient * _softcap_slope(z, spec))


def _softcap_slope(logits: Tensor, spec: TopKShardSpec) -> Tensor | float:
    softcap = spec.base.softcap
    return 1.0 if softcap is None else softcap_slope(logits, softcap)

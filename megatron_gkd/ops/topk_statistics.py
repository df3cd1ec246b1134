"""The passes that make up the divergence over the teacher's top-k tokens, in plain torch.

The ids are an irregular shard of the vocabulary: each rank reads its own logits at those ids that it owns, and what the
ranks exchange is numbers per token, never logits. There are two ways to treat the rest of the vocabulary:

    renormalize   P and S are both conditioned on the k tokens. The rest neither counts nor gets a gradient.
    bucket        the rest is one more outcome B, with p_B = sum_{u not in ids} p_u, as a log-sum-exp of its logits and
                  never as 1 - sum. The divergence is then at most the full one (data-processing inequality), and the
                  student can't hide mass outside the k tokens.

Both are the full divergence at k = V. With the slopes of ``reference.Divergence``, summed over the k (+ 1) outcomes,

    ∂D/∂z_j = (slope_j - p_j sum_u slope_u) / temperature                      for j in ids
    ∂D/∂z_j = (p_j / p_B) (slope_B - p_B sum_u slope_u) / temperature          for other j, with the bucket

Shape suffixes: N tokens, k ids of each, V valid columns of this rank's shard, R ranks of its group, P parts of the
vocabulary (the k tokens; with the bucket also the rest); n rows of a block. Logits are of any float type; arithmetic
and results are in fp32 (fp64 for fp64 student logits).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.ops.pointwise import Pointwise, pointwise_divergence, weighted
from megatron_gkd.ops.spec import accumulate_dtype, check_temperature
from megatron_gkd.ops.topk import TopK, finite, max_and_sum, row_blocks
from megatron_gkd.ops.vocabulary import VocabShard

TailMode = Literal["renormalize", "bucket"]
FORWARD_KL, REVERSE_KL = pointwise_divergence(0.0), pointwise_divergence(1.0)


@dataclass(frozen=True)
class TopKSpec:
    """What all passes of one call share."""

    pointwise: Pointwise
    temperature: float
    shard: VocabShard
    bucket: bool

    @classmethod
    def of(
        cls,
        width: int,
        *,
        beta: float,
        temperature: float = 1.0,
        group: dist.ProcessGroup | None = None,
        vocab_size: int | None = None,
        tail_mode: TailMode = "renormalize",
        divergence: str = "jsd",
    ) -> TopKSpec:
        """For shards of `width` columns, padding included. ValueError for a parameter out of range."""
        check_temperature(temperature)
        if tail_mode not in get_args(TailMode):
            raise ValueError(f"tail_mode is {tail_mode!r}; allowed are {', '.join(get_args(TailMode))}")
        shard = VocabShard.of(width, group, vocab_size)
        return cls(pointwise_divergence(beta, divergence), temperature, shard, tail_mode == "bucket")

    def check(self, topk: TopK) -> None:
        """ValueError for a bucket without the teacher's share of it."""
        if self.bucket and topk.tail is None:
            raise ValueError("tail_mode is 'bucket', but this TopK has no tail: the teacher's mass outside its top-k")
        if self.bucket and topk.temperature != self.temperature:
            raise ValueError(
                f"tail_mode is 'bucket' at temperature {self.temperature}, but this TopK's tail is for temperature "
                f"{topk.temperature}; the teacher's mass outside its top-k at one temperature does not tell that at "
                "another, and log-probabilities of the top-k alone tell it at 1 only"
            )


class LogSum(NamedTuple):
    """ln sum_u exp(z_u / temperature), of some logits z of each token, as maximum / temperature + log.

    The two are not added up, so that large logits cost no digits. They are -inf and 0 of no logits, or of -inf only.
    """

    maximum: Tensor  # [N], untempered
    log: Tensor  # [N], >= 0

    def log_shares(self, z: Tensor, rows: slice, temperature: float) -> Tensor:
        """Ln of the shares in the sum, [n, ...], that logits `z` of the `rows` have."""
        return (z - finite(self.maximum[rows])[:, None]) / temperature - self.log[rows, None]


class TopKNormalizers(NamedTuple):
    """What turns the student's logits into log-probabilities, over the whole group."""

    student: LogSum  # over the k tokens; with the bucket over the whole vocabulary
    others: LogSum | None  # over the bucket's tokens; None without a bucket

    def bucket_log_prob(self, rows: slice, temperature: float) -> Tensor:
        """Ln p_B, [n, 1]."""
        return self.student.log_shares(self.others.maximum[rows, None], rows, temperature) + self.others.log[rows, None]


class TopKSums(NamedTuple):
    """Sums over the k tokens and the bucket of the tempered distributions, each [N]."""

    value: Tensor  # the divergence
    slope: Tensor
    student_entropy: Tensor  # in nats
    teacher_entropy: Tensor
    forward_kl: Tensor  # KL(T||S)
    reverse_kl: Tensor  # KL(S||T)
    # 1.0 where a token that the teacher finds most likely is one that the student finds most likely: among the k
    # tokens, or with the bucket among all.
    top1_agreement: Tensor


def measure_topk(
    student_NV: Tensor, topk: TopK, spec: TopKSpec, *, mask: Tensor | None = None
) -> tuple[TopKNormalizers, TopKSums]:
    """Everything about these tokens but the gradient, the same bits on every rank of the group. Two collectives.

    `topk` is flat, [N, k]. The sums are 0 in rows outside `mask`. ValueError for a bucket that `topk` has no tail for.
    """
    spec.check(topk)
    normalizers = _combine(spec.shard.gather(_local_log_sums(student_NV, topk, spec)), spec)
    sums = spec.shard.gather(_local_sums(student_NV, topk, normalizers, spec)).sum(0)
    sums[:, -1].clamp_(max=1)  # several ranks may have a most likely token
    return normalizers, TopKSums(*(sums if mask is None else torch.where(mask[:, None], sums, 0)).unbind(-1))


def write_topk_gradient(
    out: Tensor,
    student_NV: Tensor,
    topk: TopK,
    normalizers: TopKNormalizers,
    slope_sum: Tensor,
    weights: Tensor,
    spec: TopKSpec,
) -> None:
    """Write ∂/∂z_S of sum_n weights[n] D_n into `out` [N, >= V], which may be the logits themselves.

    `slope_sum` and `weights` are [N], of the results' type. Rows of weight 0 become exactly 0, whatever they held, and
    so do columns from V on.
    """
    valid = spec.shard.valid
    out[:, valid:] = 0
    for block in _blocks(student_NV, topk, spec) if valid else ():
        own = _Own.of(student_NV[block], topk.ids[block], spec, slope_sum.dtype)
        a = normalizers.student.log_shares(own.logits, block, spec.temperature)
        b, bucket_b = _teacher_log_probs(topk[block], spec, slope_sum.dtype)
        factor, slopes = weights[block, None] / spec.temperature, slope_sum[block, None]
        gradient = _softmax_gradient(a, b, slopes, spec) * factor
        gradient = torch.where(own.here & (factor != 0), gradient, 0).to(out.dtype)
        if spec.bucket:
            bucket = _softmax_gradient(normalizers.bucket_log_prob(block, spec.temperature), bucket_b, slopes, spec)
            others = _without(student_NV[block], own)
            shares = normalizers.others.log_shares(others, block, spec.temperature).exp()
            out[block, :valid] = torch.where(factor == 0, 0, shares * (bucket * factor))
        else:
            out[block, :valid] = 0
        out[block].scatter_add_(1, own.columns, gradient)  # adds to zeros: at the ids the shares in the bucket are 0


def _softmax_gradient(a: Tensor, b: Tensor, slope_sum: Tensor, spec: TopKSpec) -> Tensor:
    """Slope - p sum_u slope_u."""
    p = a.exp()
    _, slope = spec.pointwise.terms(a, b, p, b.exp())
    return slope - p * slope_sum


# ---- the student's own columns


class _Own(NamedTuple):
    """What this rank has of the ids of a block of tokens, each [n, k]."""

    here: Tensor  # bool
    columns: Tensor  # int64; 0 where the id is another rank's or missing
    logits: Tensor  # -inf there

    @classmethod
    def of(cls, student_nV: Tensor, ids: Tensor, spec: TopKSpec, dtype: torch.dtype) -> _Own:
        here, columns = spec.shard.owned(ids)
        return cls(here, columns, torch.where(here, student_nV.gather(1, columns).to(dtype), -torch.inf))


def _without(student_nV: Tensor, own: _Own) -> Tensor:
    """A copy of the logits, in the type of `own.logits`, with -inf at the ids."""
    excluded = torch.zeros_like(own.logits).masked_fill_(own.here, -torch.inf)
    others = student_nV.to(own.logits.dtype, copy=True)
    return others.scatter_add_(1, own.columns, excluded)  # added, because column 0 stands for ids that are elsewhere


def _blocks(student_NV: Tensor, topk: TopK, spec: TopKSpec):
    k, width = topk.ids.shape[1], student_NV.shape[1]
    return row_blocks(student_NV.shape[0], max(k, width) if spec.bucket else k, student_NV.device)


def _local_log_sums(student_NV: Tensor, topk: TopK, spec: TopKSpec) -> Tensor:
    """[N, P, 2]: ``max_and_sum`` of this shard's logits at the ids, and of its others."""
    dtype = accumulate_dtype(student_NV.dtype)
    pieces = torch.zeros(len(student_NV), 1 + spec.bucket, 2, dtype=dtype, device=student_NV.device)
    if not spec.shard.valid:  # all padding: no maximum, no mass
        pieces[..., 0] = -torch.inf
        return pieces
    for block in _blocks(student_NV, topk, spec):
        own = _Own.of(student_NV[block], topk.ids[block], spec, dtype)
        pieces[block, 0, 0], pieces[block, 0, 1] = max_and_sum(own.logits, spec.temperature)
        if spec.bucket:
            pieces[block, 1, 0], pieces[block, 1, 1] = max_and_sum(_without(student_NV[block], own), spec.temperature)
    return pieces


def _combine(pieces_RNP2: Tensor, spec: TopKSpec) -> TopKNormalizers:
    def log_sum(pieces: Tensor) -> LogSum:
        maxima, sums = pieces.unbind(-1)
        maximum = maxima.amax((0, 2))
        total = (sums * ((maxima - finite(maximum)[:, None]) / spec.temperature).exp()).sum((0, 2))
        return LogSum(maximum, total.clamp(min=1).log())  # the largest logit adds 1, so less than 1 is nothing

    return TopKNormalizers(log_sum(pieces_RNP2), log_sum(pieces_RNP2[:, :, 1:]) if spec.bucket else None)


# ---- sums


def _local_sums(student_NV: Tensor, topk: TopK, normalizers: TopKNormalizers, spec: TopKSpec) -> Tensor:
    """[N, 7]: this shard's part of the fields of ``TopKSums``."""
    maximum = normalizers.student.maximum
    partial = maximum.new_zeros(len(student_NV), len(TopKSums._fields))
    if not spec.shard.valid:
        return partial
    for block in _blocks(student_NV, topk, spec):
        own = _Own.of(student_NV[block], topk.ids[block], spec, maximum.dtype)
        a = normalizers.student.log_shares(own.logits, block, spec.temperature)
        b, bucket_b = _teacher_log_probs(topk[block], spec, maximum.dtype)
        both_best = own.here & (own.logits == maximum[block, None]) & (b == b.amax(-1, keepdim=True))
        partial[block, :-1] = _summed_terms(a, torch.where(own.here, b, -torch.inf), spec)
        partial[block, -1] = both_best.any(-1)
        if spec.bucket and spec.shard.first == 0:  # the bucket is everyone's, and counts once
            partial[block, :-1] += _summed_terms(normalizers.bucket_log_prob(block, spec.temperature), bucket_b, spec)
    return partial


def _summed_terms(a: Tensor, b: Tensor, spec: TopKSpec) -> Tensor:
    """[n, 6] of log-probabilities [n, k]: the fields of ``TopKSums`` but the last; -inf in both adds nothing."""
    p, q = a.exp(), b.exp()
    value, slope = spec.pointwise.terms(a, b, p, q)
    forward_kl, _ = FORWARD_KL.terms(a, b, p, q)
    reverse_kl, _ = REVERSE_KL.terms(a, b, p, q)
    terms = value, slope, -weighted(p, a), -weighted(q, b), forward_kl, reverse_kl
    return torch.stack([term.sum(-1) for term in terms], -1)


# ---- the teacher, whose top-k all ranks have


def _teacher_log_probs(topk: TopK, spec: TopKSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Tempered log-probabilities: [n, k] of the ids, -inf where missing, and [n, 1] of the bucket."""
    present = (topk.ids >= 0) & (topk.ids < spec.shard.vocab_size)
    weights = torch.where(present, topk.values.to(dtype) / spec.temperature, -torch.inf)
    if not spec.bucket:
        return _log_softmax(weights), None
    # Where nothing is left for the bucket, what rounding left in the tail doesn't count.
    tail = torch.where(present.sum(-1) == spec.shard.vocab_size, -torch.inf, topk.tail.to(dtype))
    both = _log_softmax(torch.cat([weights, tail[:, None]], -1))
    return both[:, :-1], both[:, -1:]


def _log_softmax(weights: Tensor) -> Tensor:
    """-inf throughout where there is nothing to normalise."""
    maximum = finite(weights.amax(-1, keepdim=True))
    shifted = weights - maximum
    return shifted - shifted.exp().sum(-1, keepdim=True).clamp(min=1).log()

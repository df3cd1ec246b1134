"""The passes over a teacher's top-k and a student's logits, by compiled kernels or in plain torch.

    select      one read of the teacher's logits: candidates and the others' mass     then one collective
    merge       of the ranks' candidates
    statistics  one read of the student's logits: sums over the ids and the others    then one collective
    sums        of the k tokens and the bucket: value and slope of the divergence     then one collective
    combine     of the ranks' sums: metrics and losses
    gradient    one read, one write                                                   no collective

``csrc/top_k.h`` documents their columns. Without a bucket and labels, only `select` reads whole rows. The
implementation is that of ``passes``, and plain torch for the teacher's side where a GPU has no kernel for so large a k.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from megatron_gkd.ops import passes, torch_topk_passes, torch_topk_select
from megatron_gkd.ops.params import ChunkTargets, TokenResults
from megatron_gkd.ops.spec import TopKShardSpec
from megatron_gkd.ops.topk import TopK
from megatron_gkd.ops.topk_rows import TopKRows, TopKSums
from megatron_gkd.ops.vocabulary import VocabShard


def select(logits_NV: Tensor, k: int, shard: VocabShard, temperature: float | None) -> Tensor:
    """Return this shard's largest logits, what the others sum up to, and global ids, [N, k (+ 2) + k].

    The sum of the others is one of exponentials at the `temperature`, relative to their maximum, which stands before
    it; None leaves both out. All are in the bits of integers of the width of the statistics, so that one collective
    carries them. A shard with less than k valid columns is filled up with logits of -inf under the id `MISSING`.
    """
    kernels = _kernels_for_k(logits_NV, k)
    if kernels is None:
        return torch_topk_select.select(logits_NV, k, shard.first, temperature)
    return kernels.top_k_select(_with_contiguous_rows(logits_NV), k, temperature, shard.first)


def merge(gathered: Tensor, k: int, places: int, dtype: torch.dtype, temperature: float | None) -> TopK:
    """Select the k largest of all ranks' `places` candidates each, which ``select`` returned, [R, N, ...].

    `dtype` is that of the statistics.
    """
    kernels = None if dtype == torch.float64 else passes.kernels_on(gathered.device)
    if kernels is None:
        return torch_topk_select.merge(gathered, k, dtype, temperature)
    ids, values, tail = kernels.top_k_merge(gathered, places, k, temperature)
    return TopK(ids, values, tail, temperature)


def statistics(student_NV: Tensor, topk: TopK, labels: Tensor | None, spec: TopKShardSpec) -> Tensor:
    """Return this shard's statistics of each token, [N, ``num_statistics``]; labels are int64 [N], global ids."""
    kernels = passes.kernels_for(student_NV)
    if kernels is None:
        return torch_topk_passes.statistics(student_NV, topk, labels, spec)
    student, ids = _with_contiguous_rows(student_NV), topk.ids.contiguous()
    return kernels.top_k_statistics(student, ids, labels, spec.temperature, spec.has_bucket, spec.shard.first)


def sums(student_NV: Tensor, topk: TopK, gathered_RNC: Tensor, labels: Tensor | None, spec: TopKShardSpec) -> TopKSums:
    """Return normalizers, this shard's sums and the cross-entropy, from the statistics of all ranks."""
    kernels = passes.kernels_for(student_NV)
    if kernels is None:
        return torch_topk_passes.sums(student_NV, topk, gathered_RNC, labels, spec)
    student, tokens = _with_contiguous_rows(student_NV), _tokens(topk, spec)
    return TopKSums(*kernels.top_k_sums(student, *tokens, gathered_RNC, labels, *_divergence(spec), *_place(spec)))


def combine(found: TopKSums, targets: ChunkTargets, results: TokenResults) -> TopKRows:
    """Write the metrics of each token and what it adds to the loss, from the sums of all ranks.

    Returns:
        What the gradient needs of each token, with the factor of all gradients in the weights.
    """
    kernels = passes.kernels_for(found.sums)
    if kernels is None:
        return torch_topk_passes.combine(found, targets, results)
    assert targets.token_weights is not None and results.losses is not None, "a chunk has a loss"
    has_label_loss = targets.label_weights is not None and found.cross_entropy is not None
    labels, label_weights = (targets.labels, targets.label_weights) if has_label_loss else (None, None)
    weights = targets.token_weights, labels, label_weights, targets.factor
    rows = kernels.top_k_combine(found.sums, found.cross_entropy, *weights, results.metrics, results.losses)
    slope_sum, weight, label_weight = rows
    return TopKRows(found.normalizers, slope_sum, weight, labels, label_weight)


def gradient(out: Tensor, student_NV: Tensor, topk: TopK, rows: TopKRows, spec: TopKShardSpec) -> None:
    """Write the gradient of sum_n (rows.weight[n] D_n + rows.label_weight[n] CE_n) by the student's logits into `out`.

    Args:
        out: [N, >= V], which may be the logits themselves. Rows whose weights are 0 become 0, whatever their logits
            hold, and so do columns from V on.
        student_NV: this rank's valid columns.
        topk: flat, [N, k].
        rows: what the divergence and the cross-entropy need of each row.
        spec: the divergence, the shard, the softcap and the tail mode.
    """
    kernels = passes.kernels_for(student_NV)
    if kernels is None:
        torch_topk_passes.gradient(out, student_NV, topk, rows, spec)
        return
    student, tokens = _with_contiguous_rows(student_NV), _tokens(topk, spec)
    options = *_divergence(spec), *_place(spec), spec.base.softcap
    kernels.top_k_gradient(out, student, *tokens, *rows, *options)


def _kernels_for_k(logits: Tensor, k: int) -> ModuleType | None:
    kernels = passes.kernels_for(logits)
    too_many = kernels is not None and logits.device.type == "cuda" and k > kernels.most_places
    return None if too_many else kernels


def _with_contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 or logits.shape[-1] <= 1 else logits.contiguous()


def _tokens(topk: TopK, spec: TopKShardSpec) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return ids, values and, with a bucket, the tail."""
    tail = topk.tail.float().contiguous() if spec.has_bucket and topk.tail is not None else None
    return topk.ids.contiguous(), topk.values.float().contiguous(), tail


def _divergence(spec: TopKShardSpec) -> tuple[str, float, float]:
    return spec.base.divergence.name, spec.base.beta, spec.temperature


def _place(spec: TopKShardSpec) -> tuple[int, int]:
    return spec.shard.first, spec.shard.vocab_size

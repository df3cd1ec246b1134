"""Build of a cache's rows from a teacher's signals; logits stay sharded over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.checkpoint_format.cache_manifest import Manifest
from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.ops.chunking import rows_within_budget
from megatron_gkd.ops.topk import TopK, finite, max_and_sum, row_blocks
from megatron_gkd.ops.topk_choice import choose_topk
from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden, Parts, TeacherSignal
from megatron_gkd.teachers.cache.shards import CachedRow


class _Entries(NamedTuple):
    """The fields of ``CachedRow`` for any number of labels, as tensors."""

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


def build_cached_rows(
    signal: TeacherSignal, microbatch: Microbatch, manifest: Manifest, mesh: Mesh, chunk_tokens: int | None
) -> list[CachedRow] | None:
    """Return the cached row of each sample, on the first tensor- and context-parallel rank; None on the others.

    The ranks of the last pipeline stage call it together.

    Args:
        signal: of this rank.
        microbatch: of this rank.
        manifest: of the cache.
        mesh: the groups of this rank.
        chunk_tokens: rows of logits that exist at once; None: as many as fit into the default size of a chunk.
    """
    entries = _Entries(*(tensor.cpu() for tensor in _build_entries(signal, manifest, mesh, chunk_tokens)))
    if mesh.tp.rank():
        return None
    gathered = _gather(local_label_indices(microbatch, mesh.cp.rank(), mesh.cp.size()), entries, mesh.cp)
    if not gathered:
        return None
    order = torch.cat([indices for indices, _ in gathered]).argsort()
    whole = [torch.cat(tensors)[order].numpy() for tensors in zip(*(part for _, part in gathered), strict=True)]
    ends = np.cumsum([sample.num_labels for sample in microbatch.samples])[:-1]
    return [CachedRow(*arrays) for arrays in zip(*(np.split(array, ends) for array in whole), strict=True)]


def _gather(indices: Tensor, entries: _Entries, group: dist.ProcessGroup) -> list[tuple[Tensor, _Entries]]:
    """Return the label indices and entries of all context-parallel ranks on the first one; nothing on the others."""
    if group.size() == 1:
        return [(indices, entries)]
    gathered: list[Any] = [None] * group.size()
    is_first = group.rank() == 0
    first = dist.get_global_rank(group, 0)
    dist.gather_object((indices, entries), gathered if is_first else None, dst=first, group=group)
    return gathered if is_first else []


def _build_entries(signal: TeacherSignal, manifest: Manifest, mesh: Mesh, chunk_tokens: int | None) -> _Entries:
    if isinstance(signal, Parts):
        parts = [_build_entries(part.signal, manifest, mesh, chunk_tokens) for part in signal.parts]
        order = torch.cat([part.rows for part in signal.parts]).argsort()
        return _Entries(*(torch.cat(tensors)[order] for tensors in zip(*parts, strict=True)))
    if isinstance(signal, TopK):
        return _from_topk(signal, manifest)
    states, head = signal.states.gather(), signal.head.weight
    rows = chunk_tokens or rows_within_budget(len(head), head.dtype, head.device)
    chunks = [_from_hidden(signal, chunk, manifest, mesh) for chunk in states.split(rows)]
    return _Entries(*(torch.cat(tensors) for tensors in zip(*chunks, strict=True)))


def _from_hidden(signal: Hidden, states: Tensor, manifest: Manifest, mesh: Mesh) -> _Entries:
    logits = signal.head.compute_logits(states)
    shard = VocabShard.from_group(logits.shape[1], mesh.tp, manifest.vocab_size)
    logits = logits[:, : shard.valid]
    topk = choose_topk(logits, manifest.k, shard, manifest.temperature)
    # Over the largest logit, which is 0 in `topk`. At temperature 1 the top-k and its tail are all that there is.
    if manifest.temperature == 1:
        log_sum = torch.logaddexp(topk.values.double().logsumexp(-1), _tail_of(topk).double())[:, None]
    else:
        log_sum = _log_sum_exp(logits, shard)[:, None]
    log_probs = (topk.values.double() - log_sum).float()
    tail = (_tail_of(topk).double() - log_sum[:, 0] / manifest.temperature).float()
    return _Entries(topk.ids.int(), log_probs, tail)


def _log_sum_exp(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """Return ln sum exp(z - largest z) over all shards of the vocabulary: fp64 [N]."""
    pieces = torch.zeros(len(logits_NV), 2, device=logits_NV.device)
    pieces[:, 0] = -torch.inf
    rows, width = logits_NV.shape
    for block in row_blocks(rows, width, logits_NV.device) if shard.valid else ():
        pieces[block, 0], pieces[block, 1] = max_and_sum(logits_NV[block].float(), 1.0)
    maxima, sums = shard.gather(pieces).double().unbind(-1)
    return (sums * (maxima - finite(maxima.amax(0))).exp()).sum(0).log()


def _from_topk(signal: TopK, manifest: Manifest) -> _Entries:
    """Return the entries of a server's top-k: log-probabilities already, at the manifest's temperature."""
    values, order = signal.values.masked_fill(signal.ids < 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
    ids = signal.ids.gather(-1, order)
    missing = manifest.k - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return _Entries(ids.int(), values.float(), _tail_of(signal).float())


def _tail_of(topk: TopK) -> Tensor:
    if topk.tail is None:
        raise ValueError("the top-k has no tail; a cached row needs one")
    return topk.tail

"""From what a teacher says of a microbatch to what the cache keeps of its rows. No rank holds full logits."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.data.label_indices import local_label_indices
from megatron_gkd.data.microbatch import Microbatch
from megatron_gkd.ops.topk import TopK, choose_topk, finite, max_and_sum, row_blocks
from megatron_gkd.ops.vocabulary import VocabShard
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.teachers.base import Hidden, Parts, TeacherSignal
from megatron_gkd.teachers.cache.manifest import Manifest
from megatron_gkd.teachers.cache.shards import CachedRow


class _Entries(NamedTuple):
    """The fields of ``CachedRow``, of any number of labels, as tensors."""

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


def cached_rows(
    signal: TeacherSignal, microbatch: Microbatch, manifest: Manifest, mesh: Mesh, chunk_tokens: int
) -> list[CachedRow] | None:
    """Of each sample of the microbatch, on the first tensor- and context-parallel rank; None on the others.

    The ranks of the last pipeline stage call it together, with their own `signal`. `chunk_tokens`: rows of logits that
    are held at once.
    """
    entries = _Entries(*(tensor.cpu() for tensor in _entries(signal, manifest, mesh, chunk_tokens)))
    if mesh.tp.rank():
        return None
    numbers = local_label_indices(microbatch, mesh.cp.rank(), mesh.cp.size())
    gathered = [(numbers, entries)]
    if mesh.cp.size() > 1:
        gathered = [None] * mesh.cp.size() if mesh.cp.rank() == 0 else None
        dist.gather_object((numbers, entries), gathered, dst=dist.get_global_rank(mesh.cp, 0), group=mesh.cp)
        if gathered is None:
            return None
    order = torch.cat([numbers for numbers, _ in gathered]).argsort()
    whole = [torch.cat(tensors)[order].numpy() for tensors in zip(*(found for _, found in gathered), strict=True)]
    ends = np.cumsum([sample.num_labels for sample in microbatch.samples])[:-1]
    return [CachedRow(*arrays) for arrays in zip(*(np.split(array, ends) for array in whole), strict=True)]


def _entries(signal: TeacherSignal, manifest: Manifest, mesh: Mesh, chunk_tokens: int) -> _Entries:
    if isinstance(signal, Parts):
        found = [_entries(part.signal, manifest, mesh, chunk_tokens) for part in signal.parts]
        order = torch.cat([part.rows for part in signal.parts]).argsort()
        return _Entries(*(torch.cat(tensors)[order] for tensors in zip(*found, strict=True)))
    if isinstance(signal, TopK):
        return _of_topk(signal, manifest)
    chunks = [_of_hidden(signal, rows, manifest, mesh) for rows in signal.states.gather().split(chunk_tokens)]
    return _Entries(*(torch.cat(tensors) for tensors in zip(*chunks, strict=True)))


def _of_hidden(signal: Hidden, states: Tensor, manifest: Manifest, mesh: Mesh) -> _Entries:
    logits = states @ signal.head_weight.T
    shard = VocabShard.from_group(logits.shape[1], mesh.tp, manifest.vocab_size)
    logits = logits[:, : shard.valid]
    topk = choose_topk(logits, manifest.k, shard, manifest.temperature)
    log_sum = _log_sum_exp(logits, shard)[:, None]  # over the largest logit, which is 0 in `topk`
    log_probs = (topk.values.double() - log_sum).float()
    tail = (topk.tail.double() - log_sum[:, 0] / manifest.temperature).float()
    return _Entries(topk.ids.int(), log_probs, tail)


def _log_sum_exp(logits_NV: Tensor, shard: VocabShard) -> Tensor:
    """fp64 [N]: ln sum exp(z - largest z) over all shards of the vocabulary."""
    pieces = torch.zeros(len(logits_NV), 2, device=logits_NV.device)
    pieces[:, 0] = -torch.inf
    for block in row_blocks(*logits_NV.shape, logits_NV.device) if shard.valid else ():
        pieces[block, 0], pieces[block, 1] = max_and_sum(logits_NV[block].float(), 1.0)
    maxima, sums = shard.gather(pieces).double().unbind(-1)
    return (sums * (maxima - finite(maxima.amax(0))).exp()).sum(0).log()


def _of_topk(signal: TopK, manifest: Manifest) -> _Entries:
    """A server's: log-probabilities already, at the manifest's temperature."""
    values, order = signal.values.masked_fill(signal.ids < 0, -torch.inf).sort(dim=-1, descending=True, stable=True)
    ids = signal.ids.gather(-1, order)
    missing = manifest.k - ids.shape[1]
    ids = torch.nn.functional.pad(ids, (0, missing), value=-1)
    values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
    return _Entries(ids.int(), values.float(), signal.tail.float())

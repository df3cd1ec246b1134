"""The choice of the k largest logits in plain torch: for fp64, and where no kernels are compiled.

Inputs and outputs are those of the kernels; see ``topk_passes``. Shape suffixes: N tokens, n of a block, V valid
columns of this rank's vocabulary shard, R ranks of its group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_gkd.ops.spec import accumulate_dtype
from megatron_gkd.ops.topk import MISSING, TopK, finite, max_and_sum, row_blocks


def select(logits_NV: Tensor, k: int, first: int, temperature: float | None) -> Tensor:
    """Compute ``topk_passes.select`` in plain torch; `first` is the global id of the first column."""
    rows, valid = logits_NV.shape
    dtype = accumulate_dtype(logits_NV.dtype)
    values = torch.full((rows, k + 2 * (temperature is not None)), -torch.inf, dtype=dtype, device=logits_NV.device)
    ids = torch.full((rows, k), MISSING, dtype=_bits(dtype), device=logits_NV.device)
    k = min(k, valid)
    for block in row_blocks(rows, valid, logits_NV.device) if valid else ():
        columns = _largest_columns(logits_NV[block], k)
        z = logits_NV[block].to(dtype)
        values[block, :k], ids[block, :k] = z.gather(1, columns), columns + first
        if temperature is not None:
            others = z.scatter(1, columns, -torch.inf)
            values[block, -2], values[block, -1] = max_and_sum(others, temperature)
    if temperature is not None and not valid:
        values[:, -1] = 0
    return torch.cat([values.view(_bits(dtype)), ids], -1)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]


def _largest_columns(z: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest logits, int64 [n, k], by falling logit, equal ones by rising column.

    ``torch.topk`` does not define which of equal logits it selects, but it defines the k-th largest value: all above it
    are selected here, and of those equal to it the first. NaN is above all, as it is to ``torch.topk``.
    """
    width = z.shape[1]
    threshold = z.topk(k).values[:, -1:]
    precedence = torch.arange(width, 0, -1, dtype=torch.int32, device=z.device)
    above = (z > threshold) | z.isnan()
    rank = torch.where(above, precedence + width, torch.where(z == threshold, precedence, 0))
    columns = rank.topk(k).indices  # no two positive ranks are equal; each of the two parts is in rising order
    order = z.gather(1, columns).sort(stable=True, dim=-1, descending=True).indices
    return columns.gather(1, order)


def merge(gathered: Tensor, k: int, dtype: torch.dtype, temperature: float | None) -> TopK:
    """Compute ``topk_passes.merge`` in plain torch."""
    ranks, rows, width = gathered.shape
    extra = 0 if temperature is None else 2
    count = (width - extra) // 2  # candidates of a rank
    ids = torch.empty(rows, k, dtype=torch.int64, device=gathered.device)
    values = torch.empty(rows, k, dtype=dtype, device=gathered.device)
    tail = None if temperature is None else torch.empty(rows, dtype=dtype, device=gathered.device)
    for block in row_blocks(rows, ranks * count, gathered.device):
        by_row = gathered[:, block].transpose(0, 1)  # [n, R, ...]
        floats = by_row[..., : count + extra].view(dtype)
        # Ranks hold rising ids and missing entries come last of all: a stable sort leaves equals in the order of ids.
        best, order = floats[..., :count].flatten(1).sort(stable=True, dim=-1, descending=True)
        ids[block] = by_row[..., count + extra :].flatten(1).gather(1, order[:, :k])
        shift = finite(best[:, 0])
        values[block] = best[:, :k] - shift[:, None]
        if tail is not None and temperature is not None:
            tail[block] = _tail(best[:, k:], floats[..., count], floats[..., count + 1], shift, temperature)
    return TopK(ids, values, tail, temperature)


def _tail(unselected: Tensor, maxima: Tensor, sums: Tensor, shift: Tensor, temperature: float) -> Tensor:
    """Return the log-sum-exp [n] of unselected candidates [n, m] and of ranks' ``max_and_sum`` [n, R], over `shift`."""
    pieces = torch.cat([unselected, maxima], -1)
    counts = torch.cat([torch.ones_like(unselected), sums], -1)
    maximum = pieces.amax(-1)
    total = (counts * ((pieces - finite(maximum)[:, None]) / temperature).exp()).sum(-1)
    return total.log() + (maximum - shift) / temperature

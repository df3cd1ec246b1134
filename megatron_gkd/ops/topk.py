"""The teacher's most likely tokens: selected over a sharded vocabulary, or received as log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.ops.spec import accumulate_dtype, check_temperature
from megatron_gkd.ops.vocabulary import VocabShard

MISSING = -1
# Servers compute log-probabilities in fp32: a mass outside the top-k that is less than this is rounding.
SMALLEST_TAIL_MASS = torch.finfo(torch.float32).eps
# Entries of one block's temporaries: few enough for a CPU's cache, enough to keep a GPU busy.
CPU_BLOCK_ELEMENTS = 1 << 18
GPU_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TopK:
    """Hold the teacher's k most likely tokens of each row, and the mass of all others.

    Attributes:
        ids: int64 [..., k], global and distinct, in any order. An id outside the vocabulary (-1 by convention) is a
            missing entry, which does not count whatever its value is.
        values: fp32 or fp64 [..., k], the teacher's logits before the temperature, up to a constant of each row;
            log-probabilities at temperature 1 are one such choice. -inf is a token of probability zero.
        tail: [...] of the same dtype, ln sum_u exp(z_u / temperature) over all columns but `ids`, for the logits z of
            `values`, with the same constants. None where it is unknown, which rules out ``tail_mode="bucket"``.
        temperature: the temperature of `tail`; None without one. `values` do not depend on a temperature.

    Raises:
        ValueError: shapes or dtypes that do not agree.
    """

    ids: Tensor
    values: Tensor
    tail: Tensor | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64:
            raise ValueError(f"ids = {_describe(self.ids)}: must be torch.int64")
        if self.ids.dim() == 0 or self.ids.shape[-1] == 0:
            raise ValueError(f"ids = {_describe(self.ids)}: must be [..., k] with k >= 1")
        if self.values.dtype not in (torch.float32, torch.float64) or self.values.shape != self.ids.shape:
            raise ValueError(
                f"values = {_describe(self.values)}: must be torch.float32 or torch.float64 {list(self.ids.shape)}"
            )
        if (self.tail is None) != (self.temperature is None):
            raise ValueError("tail, temperature: only one of them is given; give both or neither")
        if self.tail is not None and (self.tail.dtype, self.tail.shape) != (self.values.dtype, self.ids.shape[:-1]):
            raise ValueError(f"tail = {_describe(self.tail)}: must be {self.values.dtype} {list(self.ids.shape[:-1])}")

    @classmethod
    def from_log_probs(cls, ids: Tensor, log_probs: Tensor) -> TopK:
        """Build the top-k of a teacher of which only log-probabilities at temperature 1 are known.

        The tail is ln(1 - sum of probabilities), computed in fp64, and therefore of temperature 1. It is at least
        ln `SMALLEST_TAIL_MASS`, so that rounding does not make a reverse KL infinite.

        Args:
            ids: int64 [..., k]; entries of id -1 are missing.
            log_probs: float [..., k], in nats.

        Raises:
            ValueError: the probabilities of a row add up to more than 1.01.
        """
        values = log_probs.to(accumulate_dtype(log_probs.dtype)).masked_fill(ids < 0, -torch.inf)
        largest, position = values.double().max(-1, keepdim=True)
        smaller = values.double().scatter(-1, position, -torch.inf).exp().sum(-1)
        tail_mass = -torch.expm1(largest[..., 0]) - smaller  # 1 - sum; 1 - e^largest would lose digits
        if (tail_mass < -0.01).any():
            total = 1 - tail_mass.min().item()
            raise ValueError(f"log_probs: their probabilities add up to {total:.4g} in a row; must be at most 1")
        return cls(ids, values, tail_mass.clamp(min=SMALLEST_TAIL_MASS).log().to(values.dtype), temperature=1.0)

    def flatten(self) -> TopK:
        """Return the same with all leading dimensions in one: ids [N, k]."""
        k = self.ids.shape[-1]
        tail = None if self.tail is None else self.tail.reshape(-1)
        return TopK(self.ids.reshape(-1, k), self.values.reshape(-1, k), tail, self.temperature)

    def __getitem__(self, rows: slice) -> TopK:
        """Return some rows, along the first dimension, as views."""
        return TopK(self.ids[rows], self.values[rows], None if self.tail is None else self.tail[rows], self.temperature)


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Split rows into blocks that bound the size of temporaries of `width` entries per row."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = max(1, elements // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def finite(maximum: Tensor) -> Tensor:
    """Return what is subtracted from logits before they are exponentiated: their maximum, 0 where it is -inf."""
    return torch.where(maximum == -torch.inf, 0, maximum)


def max_and_sum(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the maximum of logits [..., n] and the sum of exponentials relative to it; (-inf, 0) of -inf only."""
    maximum = z.amax(-1)
    return maximum, ((z - finite(maximum)[..., None]) / temperature).exp().sum(-1)


@torch.no_grad()
def vocab_parallel_topk(
    logits: Tensor,
    k: int,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_size: int | None = None,
    temperature: float | None = 1.0,
) -> TopK:
    """Return the k largest logits of each row, largest first; among equal ones those with the lower id.

    Each rank selects among its own columns. One all_gather of these candidates (8 bytes each, logit and id) and of the
    mass of the others (8 bytes per row) lets every rank make the same selection among them; twice that in fp64.

    Args:
        logits: float [..., V/TP], this rank's columns. The result carries no gradient.
        k: from 1 to the size of the true vocabulary.
        group: see ``DivergenceSpec``.
        vocab_size: see ``DivergenceSpec``.
        temperature: of ``TopK.tail``; None leaves the tail out, and saves a pass.

    Returns:
        ids [..., k]; values in fp32 (fp64 for fp64), the largest of each row being 0; and the tail, a log-sum-exp over
        the columns that were not selected, -inf if there are none. The same bits on every rank; ids and values do not
        depend on the number of ranks.

    Raises:
        ValueError: k or temperature is out of range, or `logits` are no floats.
    """
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(f"logits = {_describe(logits)}: must be floats [..., V]")
    tokens, width = logits.shape[:-1], logits.shape[-1]
    shard = VocabShard.from_group(width, group, vocab_size)
    check_k(k, shard)
    if temperature is not None:
        check_temperature(temperature)
    topk = choose_topk(logits.reshape(-1, width)[:, : shard.valid], k, shard, temperature)
    return TopK(
        topk.ids.view(*tokens, k),
        topk.values.view(*tokens, k),
        None if topk.tail is None else topk.tail.view(tokens),
        temperature,
    )


def check_k(k: int, shard: VocabShard) -> None:
    """Raise ValueError unless k is from 1 to the size of the true vocabulary."""
    if not 1 <= k <= shard.vocab_size:
        raise ValueError(f"k = {k}: must be from 1 to {shard.vocab_size}, the size of the vocabulary")


def choose_topk(logits_NV: Tensor, k: int, shard: VocabShard, temperature: float | None) -> TopK:
    """Compute ``vocab_parallel_topk`` of the valid columns [N, V] of a shard."""
    candidates = _candidates(logits_NV, min(k, shard.width), shard.first, temperature)
    return _merge_candidates(shard.gather(candidates), k, accumulate_dtype(logits_NV.dtype), temperature)


def _candidates(logits_NV: Tensor, k: int, first: int, temperature: float | None) -> Tensor:
    """Return this shard's largest logits, their global ids, and ``max_and_sum`` of the others, [N, k + k (+ 2)].

    All are in the bits of integers of the logits' width, so that one collective carries them. A shard with less than
    k valid columns is filled up with logits of -inf under the id `MISSING`.
    """
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
    are selected here, and of those equal to it the first.
    """
    width = z.shape[1]
    threshold = z.topk(k).values[:, -1:]
    precedence = torch.arange(width, 0, -1, dtype=torch.int32, device=z.device)
    rank = torch.where(z > threshold, precedence + width, torch.where(z == threshold, precedence, 0))
    columns = rank.topk(k).indices  # no two positive ranks are equal; each of the two parts is in rising order
    order = z.gather(1, columns).sort(stable=True, dim=-1, descending=True).indices
    return columns.gather(1, order)


def _merge_candidates(gathered: Tensor, k: int, dtype: torch.dtype, temperature: float | None) -> TopK:
    """Select the k largest of all ranks' ``_candidates`` [R, N, ...]."""
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

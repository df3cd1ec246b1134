"""The teacher's most likely tokens: chosen over a sharded vocabulary, or as a server's log-probabilities tell them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_gkd.ops.spec import accumulate_dtype, check_temperature
from megatron_gkd.ops.vocabulary import VocabShard

MISSING = -1
# Servers work out log-probabilities in fp32: what their top-k leaves of 1 is rounding where it is less than this.
SMALLEST_REST = torch.finfo(torch.float32).eps
# Entries of one block's temporaries: what a CPU's cache holds, and what keeps a GPU busy.
CPU_BLOCK_ELEMENTS = 1 << 18
GPU_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class TopK:
    """The k tokens of each row that the teacher finds most likely, and what it leaves to all others.

    Attributes:
        ids: int64 [..., k], global and distinct. An id outside the vocabulary (-1 by convention) is a missing entry: it
            doesn't count, whatever its value. In any order.
        values: fp32 or fp64 [..., k], the teacher's untempered logits, up to a constant for each row; log-probabilities
            at temperature 1 are one such choice. -inf is a token of probability zero.
        tail: [...] of the same type, ln sum_u exp(z_u / temperature) over all columns but `ids`, where the logits z are
            those of `values`, with the same constants. None where it isn't known: there is no ``tail_mode="bucket"`` then.
        temperature: that of `tail`; None without one. `values` serve every temperature.
    """

    ids: Tensor
    values: Tensor
    tail: Tensor | None = None
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64:
            raise ValueError(f"ids are {self.ids.dtype}; they must be torch.int64")
        if self.ids.dim() == 0 or self.ids.shape[-1] == 0:
            raise ValueError(f"ids are {list(self.ids.shape)}; they must be [..., k] with k from 1")
        if self.values.dtype not in (torch.float32, torch.float64) or self.values.shape != self.ids.shape:
            raise ValueError(
                f"values are {self.values.dtype} {list(self.values.shape)}; they must be torch.float32 or "
                f"torch.float64 {list(self.ids.shape)}"
            )
        if (self.tail is None) != (self.temperature is None):
            raise ValueError("tail and temperature must both be given, or neither")
        if self.tail is not None and (self.tail.dtype, self.tail.shape) != (self.values.dtype, self.ids.shape[:-1]):
            raise ValueError(
                f"tail is {self.tail.dtype} {list(self.tail.shape)}; it must be {self.values.dtype} "
                f"{list(self.ids.shape[:-1])}"
            )

    @classmethod
    def from_log_probs(cls, ids: Tensor, log_probs: Tensor) -> TopK:
        """What a teacher tells that only knows log-probabilities [..., k] of its top-k, at temperature 1.

        The tail is ln(1 - sum of probabilities), worked out in fp64, and so it is one for temperature 1 only. It is no
        less than ln `SMALLEST_REST`, lest rounding make a reverse KL infinite. Entries with id -1 are missing.

        Raises:
            ValueError: probabilities that add up to more than 1.01; these are no log-probabilities.
        """
        values = log_probs.to(accumulate_dtype(log_probs.dtype)).masked_fill(ids < 0, -torch.inf)
        largest, position = values.double().max(-1, keepdim=True)
        rest_of_sum = values.double().scatter(-1, position, -torch.inf).exp().sum(-1)
        rest = -torch.expm1(largest[..., 0]) - rest_of_sum  # 1 - sum, without the digits that 1 - e^largest would lose
        if (rest < -0.01).any():
            raise ValueError(f"log_probs are of probabilities that add up to {1 - rest.min().item():.4g}; allowed is 1")
        return cls(ids, values, rest.clamp(min=SMALLEST_REST).log().to(values.dtype), temperature=1.0)

    def flatten(self) -> TopK:
        """The same with all leading dimensions in one: ids [N, k]."""
        k = self.ids.shape[-1]
        tail = None if self.tail is None else self.tail.reshape(-1)
        return TopK(self.ids.reshape(-1, k), self.values.reshape(-1, k), tail, self.temperature)

    def __getitem__(self, rows: slice) -> TopK:
        """Some rows, along the first dimension, as views."""
        return TopK(self.ids[rows], self.values[rows], None if self.tail is None else self.tail[rows], self.temperature)


def row_blocks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """All rows, in blocks that bound the temporaries of `width` entries a row, whatever the number of rows."""
    elements = CPU_BLOCK_ELEMENTS if device.type == "cpu" else GPU_BLOCK_ELEMENTS
    step = max(1, elements // max(width, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def finite(maximum: Tensor) -> Tensor:
    """What to subtract from logits before they are exponentiated: their maximum, 0 where all of them are -inf."""
    return torch.where(maximum == -torch.inf, 0, maximum)


def max_and_sum(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Of logits [..., n]: the maximum, and the sum of exponentials against it; (-inf, 0) of -inf only."""
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
    """The k largest logits of each row, largest first; of equal ones those with the lower id, on any number of ranks.

    Each rank chooses among its own columns; one all_gather of these candidates (8 bytes each: logit and id) and of what
    they leave (8 bytes a row) lets every rank make the same choice among them. Twice that in fp64.

    Args:
        logits: [..., V/TP], of any float type: this rank's columns. The result carries no gradient.
        k: from 1 to the true vocabulary's size.
        group, vocab_size: as for ``divergence.vocab_parallel_divergence``.
        temperature: that of ``TopK.tail``; None leaves the tail out, and saves a pass.

    Returns:
        ids [..., k]; values in fp32 (fp64 for fp64), each row's largest being 0; and the tail, a log-sum-exp over the
        columns that were not chosen, -inf if there are none. The same bits on every rank, and ids and values the same
        for every number of ranks.

    Raises:
        ValueError: k or temperature out of range, or `logits` of no float type.
    """
    if not logits.is_floating_point() or logits.dim() == 0:
        raise ValueError(f"logits are {logits.dtype} {list(logits.shape)}; allowed are floats [..., V]")
    tokens, width = logits.shape[:-1], logits.shape[-1]
    shard = VocabShard.of(width, group, vocab_size)
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
    if not 1 <= k <= shard.vocab_size:
        raise ValueError(f"k is {k}; allowed are 1 to {shard.vocab_size}, the size of the vocabulary")


def choose_topk(logits_NV: Tensor, k: int, shard: VocabShard, temperature: float | None) -> TopK:
    """``vocab_parallel_topk`` of the valid columns [N, V] of a shard."""
    candidates = _candidates(logits_NV, min(k, shard.width), shard.first, temperature)
    ids, values, tail = _choose(shard.gather(candidates), k, accumulate_dtype(logits_NV.dtype), temperature)
    return TopK(ids, values, tail, temperature)


def _candidates(logits_NV: Tensor, k: int, first: int, temperature: float | None) -> Tensor:
    """[N, k + k (+ 2)]: this shard's largest logits, their global ids, and ``max_and_sum`` of the rest for a tail.

    All in the bits of integers of the logits' width, so that one collective carries both. Where the shard has less than
    k valid columns it fills up with logits of -inf under the id `MISSING`.
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
            rest = z.scatter(1, columns, -torch.inf)
            values[block, -2], values[block, -1] = max_and_sum(rest, temperature)
    if temperature is not None and not valid:
        values[:, -1] = 0
    return torch.cat([values.view(_bits(dtype)), ids], -1)


def _bits(dtype: torch.dtype) -> torch.dtype:
    return {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]


def _largest_columns(z: Tensor, k: int) -> Tensor:
    """int64 [n, k], by falling logit, equal ones by rising column. ``torch.topk`` leaves open which of equals it takes,
    but not the k-th largest value: all above it are in, and of those equal to it the first.
    """
    width = z.shape[1]
    threshold = z.topk(k).values[:, -1:]
    precedence = torch.arange(width, 0, -1, dtype=torch.int32, device=z.device)
    rank = torch.where(z > threshold, precedence + width, torch.where(z == threshold, precedence, 0))
    columns = rank.topk(k).indices  # no two positive ranks are equal; each of the two parts is in rising order
    order = z.gather(1, columns).sort(stable=True, dim=-1, descending=True).indices
    return columns.gather(1, order)


def _choose(
    gathered: Tensor, k: int, dtype: torch.dtype, temperature: float | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ids [N, k], values [N, k] and tail [N]: the k best of all ranks' ``_candidates`` [R, N, ...]."""
    ranks, rows, width = gathered.shape
    extra = 0 if temperature is None else 2
    each = (width - extra) // 2  # candidates of a rank
    ids = torch.empty(rows, k, dtype=torch.int64, device=gathered.device)
    values = torch.empty(rows, k, dtype=dtype, device=gathered.device)
    tail = None if temperature is None else torch.empty(rows, dtype=dtype, device=gathered.device)
    for block in row_blocks(rows, ranks * each, gathered.device):
        by_row = gathered[:, block].transpose(0, 1)  # [n, R, ...]
        floats = by_row[..., : each + extra].view(dtype)
        # Ranks hold rising ids and missing entries come last of all: a stable sort leaves equals in the order of ids.
        best, order = floats[..., :each].flatten(1).sort(stable=True, dim=-1, descending=True)
        ids[block] = by_row[..., each + extra :].flatten(1).gather(1, order[:, :k])
        shift = finite(best[:, 0])
        values[block] = best[:, :k] - shift[:, None]
        if temperature is not None:
            rest, rest_sums = floats[..., each], floats[..., each + 1]
            pieces = torch.cat([best[:, k:], rest], -1)
            counts = torch.cat([torch.ones_like(best[:, k:]), rest_sums], -1)
            maximum = pieces.amax(-1)
            total = (counts * ((pieces - finite(maximum)[:, None]) / temperature).exp()).sum(-1)
            tail[block] = total.log() + (maximum - shift) / temperature
    return ids, values, tail

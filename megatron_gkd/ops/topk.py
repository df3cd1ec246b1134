"""The teacher's most likely tokens: the type, log-probabilities as one, and helpers of its passes in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_gkd.ops.spec import accumulate_dtype

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
            raise ValueError(f"ids = {describe(self.ids)}: must be torch.int64")
        if self.ids.dim() == 0 or self.ids.shape[-1] == 0:
            raise ValueError(f"ids = {describe(self.ids)}: must be [..., k] with k >= 1")
        if self.values.dtype not in (torch.float32, torch.float64) or self.values.shape != self.ids.shape:
            raise ValueError(
                f"values = {describe(self.values)}: must be torch.float32 or torch.float64 {list(self.ids.shape)}"
            )
        if (self.tail is None) != (self.temperature is None):
            raise ValueError("tail, temperature: only one of them is given; give both or neither")
        if self.tail is not None and (self.tail.dtype, self.tail.shape) != (self.values.dtype, self.ids.shape[:-1]):
            raise ValueError(f"tail = {describe(self.tail)}: must be {self.values.dtype} {list(self.ids.shape[:-1])}")

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


def describe(tensor: Tensor) -> str:
    """Return dtype and shape, for messages."""
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

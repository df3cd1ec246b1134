"""Which divergence a call computes, and the numbers that all its passes share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.distributed as dist

from megatron_gkd.ops.reference import FORWARD_KL, REVERSE_KL, Divergence, divergence_at
from megatron_gkd.ops.vocabulary import VocabShard

LOG2_E = math.log2(math.e)
# Between these temperatures, fp32 values and gradients for logits of ordinary size (about 10) are right to 1 %. Above,
# log-probabilities differ by less than their rounding errors; below, gradients are such errors over the temperature.
TEMPERATURES = (1e-2, 1e3)

TailMode = Literal["renormalize", "bucket"]
"""How the tokens outside the teacher's top-k count; see ``topk_statistics``."""


@dataclass(frozen=True)
class DivergenceSpec:
    """Specify a divergence of student S and teacher T, and the ranks that share the vocabulary.

    Attributes:
        beta: the weight of the teacher in the mixture M = beta T + (1 - beta) S, from 0 to 1. With "jsd": 0 is forward
            KL(T||S), 1 is reverse KL(S||T).
        temperature: divides both models' logits. There is no factor of temperature².
        divergence: "jsd", the generalized Jensen-Shannon divergence (arXiv:2306.13649, equation 1), or another name of
            ``config.divergences.FAMILIES``.
        group: the tensor-parallel ranks that share the vocabulary, in equal shards in rank order; None where one rank
            holds all of it.
        vocab_size: the true size of the vocabulary over all ranks; None if every column counts. Columns past it are
            padding: they do not count, and their gradient is 0.

    Raises:
        ValueError: an unknown divergence, a beta that it does not allow, or a temperature out of range.
    """

    beta: float
    temperature: float = 1.0
    divergence: str = "jsd"
    group: dist.ProcessGroup | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        divergence_at(self.beta, self.divergence)

    def on_shard(self, width: int, softcap: float | None = None) -> ShardSpec:
        """Return the specification for this rank's shard of `width` columns, and the softcap of the student's logits.

        Raises:
            ValueError: the shards together do not hold `vocab_size` columns.
        """
        shard = VocabShard.from_group(width, self.group, self.vocab_size)
        return ShardSpec(divergence_at(self.beta, self.divergence), self.beta, self.temperature, shard, softcap)


@dataclass(frozen=True)
class ShardSpec:
    """Hold a ``DivergenceSpec`` resolved for one rank.

    Attributes:
        divergence: the divergence itself.
        beta: see ``DivergenceSpec``.
        temperature: see ``DivergenceSpec``.
        shard: the rank's vocabulary shard.
        softcap: of the student's logits y = cap tanh(z / cap), rounded to their dtype. Gradients are then those by z;
            without one (None) by y.
    """

    divergence: Divergence
    beta: float
    temperature: float
    shard: VocabShard
    softcap: float | None = None

    @property
    def needs_sums(self) -> bool:
        """Whether value and slope sum need a pass of their own; those of the KL divergences are in the statistics."""
        return self.divergence not in (FORWARD_KL, REVERSE_KL)

    def overlapping(self, meanwhile: Callable[[], None]) -> ShardSpec:
        """Return the same specification; `meanwhile` is called while a collective is under way."""
        return replace(self, shard=replace(self.shard, meanwhile=meanwhile))

    def scale(self, dtype: torch.dtype) -> float:
        """Return log2(e) / temperature, which turns logits into bits, rounded as the passes in `dtype` round it."""
        return round_to(LOG2_E / self.temperature, dtype)


@dataclass(frozen=True)
class TopKSpec:
    """Specify that only the teacher's most likely tokens are compared.

    Attributes:
        k: how many of them; None for all that the teacher gives.
        tail_mode: "renormalize" both distributions over these tokens, or add the others as one "bucket".

    Raises:
        ValueError: k is less than 1, or the tail mode is unknown.
    """

    k: int | None = None
    tail_mode: TailMode = "renormalize"

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 1:
            raise ValueError(f"k = {self.k}: must be >= 1")
        if self.tail_mode not in get_args(TailMode):
            raise ValueError(f"tail_mode = {self.tail_mode!r}: must be one of {', '.join(get_args(TailMode))}")


@dataclass(frozen=True)
class TopKShardSpec:
    """Hold what all passes over a top-k share: the divergence on this rank's shard, and the tail mode."""

    base: ShardSpec
    tail_mode: TailMode

    @property
    def temperature(self) -> float:
        """The temperature of both distributions."""
        return self.base.temperature

    @property
    def shard(self) -> VocabShard:
        """This rank's shard of the vocabulary."""
        return self.base.shard

    @property
    def has_bucket(self) -> bool:
        """Whether the tokens outside the top-k are one more outcome."""
        return self.tail_mode == "bucket"


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is within ``TEMPERATURES``."""
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise ValueError(f"temperature = {temperature}: must be from {lowest:g} to {highest:g}")


@functools.cache
def round_to(x: float, dtype: torch.dtype) -> float:
    """Return `x` rounded to a float dtype."""
    return torch.tensor(x, dtype=dtype).item()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of all statistics of logits of `dtype`, and of the arithmetic on them."""
    return torch.float64 if dtype == torch.float64 else torch.float32

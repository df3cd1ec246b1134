"""What all passes of one call share: which divergence, at which temperature, of which vocabulary shard."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from megatron_gkd.ops.reference import FORWARD_KL, REVERSE_KL, Divergence, divergence_at
from megatron_gkd.ops.vocabulary import VocabShard

LOG2_E = math.log2(math.e)
# Between these temperatures, fp32 values and gradients for logits of ordinary size (about 10) are right to 1 %. Above,
# log-probabilities differ by less than their rounding errors; below, gradients are such errors over the temperature.
TEMPERATURES = (1e-2, 1e3)


@dataclass(frozen=True)
class DivergenceSpec:
    divergence: Divergence
    beta: float
    temperature: float
    shard: VocabShard

    @classmethod
    def of(cls, beta: float, temperature: float, shard: VocabShard, divergence: str = "jsd") -> DivergenceSpec:
        """ValueError for an unknown divergence, a beta that it doesn't allow, or a temperature out of range."""
        check_temperature(temperature)
        return cls(divergence_at(beta, divergence), beta, temperature, shard)

    @property
    def needs_sums(self) -> bool:
        """Whether value and slope sum take a pass of their own; the KL divergences' fall out of the statistics."""
        return self.divergence not in (FORWARD_KL, REVERSE_KL)

    def scale(self, dtype: torch.dtype) -> float:
        """From logits to bits, log2(e) / temperature, rounded as the passes in `dtype` round it."""
        return round_to(LOG2_E / self.temperature, dtype)


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless `temperature` is within ``TEMPERATURES``."""
    lowest, highest = TEMPERATURES
    if not lowest <= temperature <= highest:
        raise ValueError(f"temperature is {temperature}; allowed are values from {lowest:g} to {highest:g}")


def round_to(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=dtype).item()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of all statistics and of the arithmetic on logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32

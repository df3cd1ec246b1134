"""The sizes that are measured, and the inputs and the least memory traffic of each."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BETAS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Case:
    """The divergence of `tokens` rows of one rank's `vocab / tp` columns.

    Collectives are not part of it: the columns are measured on one process.
    """

    tokens: int
    vocab: int
    tp: int = 1
    dtype: str = "bf16"
    beta: float = 0.5
    divergence: str = "jsd"  # one of config.divergences.FAMILIES

    @property
    def columns(self) -> int:
        return self.vocab // self.tp

    @property
    def logits_bytes(self) -> int:
        """The bytes of one model's logits."""
        return self.tokens * self.columns * DTYPES[self.dtype].itemsize

    @property
    def forward_bytes(self) -> int:
        """The bytes that the forward pass moves at least, where logits don't fit on chip.

        It reads both models' logits for the statistics, and again for the sums of 0 < beta < 1, which need the
        statistics.
        """
        return self.logits_bytes * (4 if 0 < self.beta < 1 else 2)

    @property
    def total_bytes(self) -> int:
        """The bytes that forward and backward move: the gradient reads both models' logits and writes as many."""
        return self.forward_bytes + 3 * self.logits_bytes

    def __str__(self) -> str:
        shard = f" / TP {self.tp}" if self.tp > 1 else ""
        family = "" if self.divergence == "jsd" else f"{self.divergence.replace('_', ' ')}, "
        return f"{self.tokens} × {self.vocab}{shard}, {self.dtype}, {family}β {self.beta:g}"

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Draw the logits [tokens, columns] of student and teacher.

        They are as alike as those of a trained pair: their standard deviation is 3, that of the difference 1. The
        student's need a gradient.
        """
        generator = torch.Generator(device).manual_seed(0)

        def noise(scale: float) -> Tensor:
            size = (self.tokens, self.columns)
            return torch.empty(size, dtype=DTYPES[self.dtype], device=device).normal_(0, scale, generator=generator)

        teacher = noise(3.0)
        return noise(1.0).add_(teacher).requires_grad_(), teacher


def grid(
    tokens: Iterable[int], vocab: Iterable[int], tp: Iterable[int], dtypes: Iterable[str], betas: Iterable[float]
) -> Iterator[Case]:
    return (Case(*point) for point in itertools.product(tokens, vocab, tp, dtypes, betas))


def full_grid() -> list[Case]:
    return list(grid((1024, 8192), (32000, 151936), (1, 4), ("bf16", "fp32"), BETAS))


def default_cases(device: torch.device) -> list[Case]:
    """What shows the op within about two minutes."""
    if device.type == "cuda":
        large = grid((8192,), (151936,), (1,), ("bf16",), BETAS)
        return [*large, Case(8192, 151936, tp=4), Case(8192, 151936, dtype="fp32"), Case(1024, 32000)]
    return [Case(512, 151936, dtype="fp32"), *(Case(64, 151936, dtype="fp32", beta=beta) for beta in (0.0, 1.0))]

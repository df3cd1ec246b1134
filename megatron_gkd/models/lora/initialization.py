"""Initialize the factors with values that depend only on the seed and the factor's name in the whole model.

If each rank drew its own values, they would depend on the layout, and the first layers of all pipeline stages would
begin with equal ones, as the stages' generators do.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor

from megatron_gkd.models.lora.factors import Factor
from megatron_gkd.models.lora.options import LoraOptions


@torch.no_grad()
def initialize_factors(factors: Iterable[Factor], options: LoraOptions, tp_rank: int, tp_size: int) -> None:
    """Set every factor to its share of the whole factor, which is drawn on the host."""
    for factor in factors:
        if factor.kind == "B" and options.b_std == 0:
            factor.parameter.zero_()
            continue
        whole = _draw(factor, factor.whole_shape(tp_size), options)
        factor.parameter.copy_(factor.shard_of(whole, tp_rank, tp_size))


def _draw(factor: Factor, shape: list[int], options: LoraOptions) -> Tensor:
    digest = hashlib.sha256(f"{options.seed}/{factor.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    whole = torch.empty(shape, dtype=torch.float32)
    if factor.kind == "B":
        return whole.uniform_(-options.b_std, options.b_std, generator=generator)
    if options.initialization == "gaussian":
        return whole.normal_(0, 1 / shape[0], generator=generator)
    bound = 1 / math.sqrt(shape[1])  # PEFT's kaiming_uniform_(a=sqrt(5))
    return whole.uniform_(-bound, bound, generator=generator)

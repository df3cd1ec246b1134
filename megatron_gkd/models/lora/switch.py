"""Switching a model's adapters off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn

from megatron_gkd.models.lora.factors import lora_modules


@contextlib.contextmanager
def adapters_disabled(chunks: Sequence[nn.Module]) -> Iterator[None]:
    """The chunks are the base model inside, bit by bit.

    PEFT's own switch also changes which parameters are trained, which the gradients' buffers must not see.
    """
    modules = [module for chunk in chunks for _, module in lora_modules(chunk)]
    before = [module._disable_adapters for module in modules]
    for module in modules:
        module._disable_adapters = True
    try:
        yield
    finally:
        for module, disabled in zip(modules, before, strict=True):
            module._disable_adapters = disabled

"""Frequencies of rotary embeddings, which are computed from values."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch


def compute_frequencies_on_host() -> None:
    """Let mcore-bridge compute the frequencies on the CPU, also where tensors are created on the meta device."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mcore_bridge") and hasattr(module, "get_rope_inv_freq"):
            _wrap(module)


def _wrap(module: Any) -> None:
    compute = module.get_rope_inv_freq

    @functools.wraps(compute)
    def get_rope_inv_freq(*args: Any, **options: Any) -> Any:
        with torch.device("cpu"):
            return compute(*args, **options)

    module.get_rope_inv_freq = get_rope_inv_freq

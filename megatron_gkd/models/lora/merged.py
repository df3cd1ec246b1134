"""Export a model with adapters: the merged weights, or those of the base.

mcore-bridge exports the base's weights of a model with adapters, without a warning; PEFT's `merge` and `unmerge` leave
rounding errors in the base. Here a layer's parameters point to a merged copy while that layer is exported, so that one
layer is copied at a time and the base's memory is never written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_gkd.models.lora.factors import ADAPTER, lora_modules, weights_of


class MergingExport:
    """Replaces a method of a bridge, so that all its exports have merged weights.

    Args:
        bridge: mcore-bridge's, of the model.

    Attributes:
        is_merging: false inside `base_weights`.
        dtype: the dtype of the merged weights; None for that of the base. fp32 keeps what the base's dtype rounds away.
    """

    def __init__(self, bridge: Any) -> None:
        self.is_merging = True
        self.dtype: torch.dtype | None = None
        self._bridge, self._set_layer_state, self._set_module = bridge, bridge._set_layer_state, bridge._set_module
        bridge._set_layer_state, bridge._set_module = self._export_layer, self._export_tower

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Export the base's weights inside."""
        self.is_merging = False
        try:
            yield
        finally:
            self.is_merging = True

    @contextlib.contextmanager
    def in_dtype(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Export adapted layers in `dtype` inside."""
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    def _export_layer(self, layer: nn.Module | None, hf_state: Any, prefix: str, index: int, to_mcore: bool) -> Any:
        if layer is None or to_mcore or self._bridge._peft_format or not self.is_merging:
            return self._set_layer_state(layer, hf_state, prefix, index, to_mcore)
        with _merged(layer, self.dtype):
            return self._set_layer_state(layer, hf_state, prefix, index, to_mcore)

    def _export_tower(self, tower: nn.Module | None, hf_state: Any, prefix: str, to_mcore: bool) -> Any:
        if tower is None or to_mcore or self._bridge._peft_format or not self.is_merging:
            return self._set_module(tower, hf_state, prefix, to_mcore)
        with _merged(tower, self.dtype):
            return self._set_module(tower, hf_state, prefix, to_mcore)


@contextlib.contextmanager
def _merged(layer: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Let the parameters of the adapted layers in `layer` point to merged copies inside."""
    saved: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for _, module in lora_modules(layer):
            scaling = module.scaling[ADAPTER]
            factors = (weights_of(linear[ADAPTER]) for linear in (module.lora_A, module.lora_B))
            for weight, a, b in zip(weights_of(module.base_layer), *factors, strict=True):
                base = weight.data
                saved.append((weight, base))
                weight.data = (b.float() @ a.float()).mul_(scaling).add_(base).to(dtype or base.dtype)
        yield
    finally:
        for weight, base in saved:
            weight.data = base

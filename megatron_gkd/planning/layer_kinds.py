"""Find out which layers of a chunk are the same, and run it with some of them."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from megatron_gkd.models.vision.parts import language_model


@dataclass(frozen=True)
class Unit:
    """Consecutive layers that are recomputed together; one layer where none is.

    Attributes:
        layers: the layers.
        kind: equal for units that cost the same.
        is_recomputed: whether `recompute_method: block` recomputes it.
    """

    layers: tuple[nn.Module, ...]
    kind: Hashable
    is_recomputed: bool = False


@dataclass(frozen=True)
class Layers:
    """The layers of a chunk, in units.

    Attributes:
        block: the module that runs them.
        units: in their order.
    """

    block: Any
    units: tuple[Unit, ...]

    @contextlib.contextmanager
    def only(self, units: Sequence[Unit]) -> Iterator[None]:
        """Let the chunk have these units alone inside; recomputed ones are run first."""
        block, config = self.block, self.block.config
        before = block.layers, block.num_layers_per_pipeline_rank, config.recompute_num_layers
        ordered = sorted(units, key=lambda unit: not unit.is_recomputed)
        block.layers = nn.ModuleList([layer for unit in ordered for layer in unit.layers])
        block.num_layers_per_pipeline_rank = len(block.layers)
        if config.recompute_method == "block" and any(unit.is_recomputed for unit in self.units):
            config.recompute_num_layers = sum(unit.is_recomputed for unit in ordered)
        try:
            yield
        finally:
            block.layers, block.num_layers_per_pipeline_rank, config.recompute_num_layers = before


def layers_of(chunk: Any, *, is_trained: bool) -> Layers:
    """Return the layers of a chunk.

    Args:
        chunk: the chunk, not wrapped by DDP.
        is_trained: whether there is a backward pass, for which layers may be recomputed.
    """
    block = language_model(chunk).decoder
    config, layers = block.config, tuple(block.layers)
    kinds = [_kind(layer) for layer in layers]
    is_full = is_trained and config.recompute_granularity == "full"
    if is_full and config.recompute_method == "block":
        recomputed = config.recompute_num_layers
        return Layers(
            block,
            tuple(
                Unit((layer,), (kind, index < recomputed), index < recomputed)
                for index, (layer, kind) in enumerate(zip(layers, kinds, strict=True))
            ),
        )
    size = config.recompute_num_layers if is_full else 1
    starts = range(0, len(layers), size)
    return Layers(block, tuple(Unit(layers[i : i + size], tuple(kinds[i : i + size])) for i in starts))


def _kind(layer: nn.Module) -> Hashable:
    """Return what a layer's costs depend on: its modules, the shapes of its parameters, and its attention's window."""
    modules = tuple(
        (name, type(module).__name__, getattr(module, "window", None)) for name, module in layer.named_modules()
    )
    parameters = tuple((name, tuple(one.shape), one.dtype, one.requires_grad) for name, one in layer.named_parameters())
    return modules, parameters

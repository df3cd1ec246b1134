"""PEFT adapters that are merged into a checkpoint's weights as these are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megatron_gkd.checkpoint_format.adapter_files import WEIGHTS, AdapterFiles, Shape


class MergedAdapters:
    """The adapters in a folder, whatever trained them: modules may have factors A of their own.

    Args:
        folder: PEFT's.
        shapes: of the base's weights.

    Raises:
        AdapterProblem: they do not fit the base, or are of a kind that can't be merged.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Shape]) -> None:
        self.folder = folder
        self._modules = AdapterFiles.open(folder).modules(shapes)

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Return the base's weight of this name with its adapters in it, in fp32, or as it is if it has none."""
        module = self._modules.get(name)
        if module is None:
            return weight
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a, b = (file.get_tensor(factor).float().to(weight.device) for factor in (module.a, module.b))
        return (b @ a).mul_(module.scaling).add_(weight)

"""Merge PEFT adapters into a checkpoint's weights while these are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from megatron_gkd.checkpoint_format.adapter_files import WEIGHTS, AdapterFiles, Shape


class MergedAdapters:
    """The adapters in a folder, also those of other trainers, in which each module has its own factor A.

    Args:
        folder: written by PEFT or in its format.
        shapes: shapes of the base's weights, by their names in transformers.
        rename: returns the name in transformers of a tensor in the base's files.

    Raises:
        AdapterProblem: the adapters do not fit the base, or are of a kind that can't be merged.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Shape], rename: Callable[[str], str]) -> None:
        self.folder, self._rename = folder, rename
        self._modules = AdapterFiles.open(folder).modules(shapes)

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """Return the base's `weight` of this name, merged with its adapters in fp32, or unchanged if it has none."""
        module = self._modules.get(self._rename(name))
        if module is None:
            return weight
        with safe_open(self.folder / WEIGHTS, framework="pt") as file:
            a, b = (file.get_tensor(factor).float().to(weight.device) for factor in (module.a, module.b))
        return (b @ a).mul_(module.scaling).add_(weight)

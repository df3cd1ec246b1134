"""Values of tensors that have none, where Megatron's optimizer reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ONES = {
    torch.Tensor.item: 1.0,
    torch.Tensor.__float__: 1.0,
    torch.Tensor.__int__: 1,
    torch.Tensor.__bool__: True,
}


class ReadingOnes(TorchFunctionMode):
    """Reads every number on the meta device as one inside: a gradient's norm, or a flag."""

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _ONES and args[0].is_meta:
            return _ONES[func]
        return func(*args, **(kwargs or {}))

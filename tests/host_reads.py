"""Find where code waits for the device: where it reads a tensor's values or a number that depends on them.

On a CPU nothing waits, but the same operators are called. Each is recorded with the place in the code that calls it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from benchmarks.collectives import attention_biases_outside_modes
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = {
    "_local_scalar_dense",  # item(), int(), float(), bool()
    "is_nonzero",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "equal",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "bincount",
}
METHODS = {"tolist", "numpy", "cpu", "__array__"}
_INDEXING = {"index", "index_put", "index_put_"}
_HERE = Path(__file__)
_PASSED_OVER = {"contextlib.py", "cpu_patches.py"}


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in _INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        by_mask = by_mask and not (name != "index" and args[2].numel() == 1)  # a number is written by masked_fill
        by_count = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if func.namespace == "aten" and (name in OPERATORS or by_mask or by_count):
            self._found[f"{_place()}: {name}"] += 1
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Record methods that reach no operator where the tensor is on the CPU already, and copies from the host."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        from_host = name in ("tensor", "as_tensor") and kwargs.get("device") is not None
        to_device = name == "to" and any(isinstance(x, torch.device | str) for x in (*args[1:], kwargs.get("device")))
        if name in METHODS or from_host or to_device:
            self._found[f"{_place()}: {name}"] += 1
        return func(*args, **kwargs)


@contextlib.contextmanager
def host_reads() -> Iterator[Counter[str]]:
    """Yield a counter of what the code inside waits for, under `file.py, function: operator`."""
    found: Counter[str] = Counter()
    with attention_biases_outside_modes(), _Methods(found), _Operators(found):
        yield found


def _place() -> str:
    """Return file and function of the innermost caller outside of torch."""
    frame = sys._getframe(2)
    while frame.f_back is not None:
        path = Path(frame.f_code.co_filename)
        if "torch" not in path.parts and path != _HERE and path.name not in _PASSED_OVER:
            break
        frame = frame.f_back
    parts = Path(frame.f_code.co_filename).parts
    start = max(
        (i for i, part in enumerate(parts) if part in ("megatron_gkd", "megatron", "site-packages")), default=-2
    )
    name = "/".join(parts[start:]).removeprefix("site-packages/")
    return f"{name}, {frame.f_code.co_name}"

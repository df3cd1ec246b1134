"""Import Megatron-Core and mcore-bridge on a platform that has no Triton, such as macOS."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any, NoReturn

_MODULES = (
    "mcore_bridge.model.modules.kernels.qsa_block_sparse_attn",
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops",
    "megatron.core.inference.contexts.fused_kv_append_kernel",
    "megatron.core.transformer.custom_layers.batch_invariant_kernels",
)


def replace_missing_triton_kernels() -> None:
    """Replace the modules of Triton kernels whose import fails without Triton; does nothing where it is installed.

    mcore-bridge 1.6.5 and Megatron-Core 0.16 import them unconditionally; none of them is used by the models and
    features that this package supports.
    """
    if importlib.util.find_spec("triton") is None:
        sys.modules.update({name: _MissingKernels(name) for name in _MODULES if name not in sys.modules})


class _MissingKernels(types.ModuleType):
    """A module whose functions can be imported, but not called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise ImportError(f"{self.__name__}.{name} needs Triton, which is not installed here")

        return refuse

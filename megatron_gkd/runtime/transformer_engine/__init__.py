"""PyTorch fallback for the Transformer Engine classes that Megatron-Core's layer specs name.

Megatron's own "local" layer spec has no packed input and no context parallelism, and its MoE does not train with
tensor parallelism. With this fallback the Transformer Engine spec builds, trains and converts on a CPU, or on a GPU
without Transformer Engine. Where the real library is installed, `install_fallback()` does nothing.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import portability

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_VERSION = "2.8.0"  # the version whose interface the fallback has
_EMPTY_CLASSES = (
    "Linear",
    "LayerNormLinear",
    "RMSNorm",
    "LayerNorm",
    "GroupedLinear",
    "DotProductAttention",
    "LayerNormMLP",
    "TransformerLayer",
)


def install_fallback() -> bool:
    """Put the fallback in place, before mcore-bridge is imported. Return False where the real library is used."""
    if _is_fallback_installed():
        return True
    if importlib.util.find_spec("transformer_engine") is not None:
        return False

    from megatron_gkd.runtime.transformer_engine import attention, grouped_linear, linear, norm

    import megatron.core.extensions.transformer_engine as extension

    classes: dict[str, type] = {
        "TENorm": norm.TENorm,
        "TELinear": linear.TELinear,
        "TEColumnParallelLinear": linear.TEColumnParallelLinear,
        "TERowParallelLinear": linear.TERowParallelLinear,
        "TELayerNormColumnParallelLinear": linear.TELayerNormColumnParallelLinear,
        "TEGroupedLinear": grouped_linear.TEGroupedLinear,
        "TEColumnParallelGroupedLinear": grouped_linear.TEColumnParallelGroupedLinear,
        "TERowParallelGroupedLinear": grouped_linear.TERowParallelGroupedLinear,
        "TEDotProductAttention": attention.TEDotProductAttention,
    }
    for name, cls in classes.items():
        setattr(extension, name, cls)
    if extension.TEFusedMLP is None:
        extension.TEFusedMLP = type("TEFusedMLP", (nn.Module,), {})
    _replace_in_megatron(classes, extension.TEFusedMLP)
    _register_package()
    return True


def is_real() -> bool:
    """Return whether the models' layers are those of the real Transformer Engine."""
    return not _is_fallback_installed() and importlib.util.find_spec("transformer_engine") is not None


def choose_attention(attn: str, dtype: torch.dtype) -> str:
    """Return the attention that a recipe's `attn` means for packed rows of `dtype`: auto, flash, fused or sdpa.

    Of Transformer Engine's implementations the unfused one has no packed rows, and the others no fp32, where `auto`
    means that of torch.

    Raises:
        UserError: Transformer Engine's attention is requested, and it can't run here.
    """
    if attn == "auto":
        return "sdpa" if dtype == torch.float32 else "auto"
    if attn == "sdpa":
        return attn
    for condition, problem in (
        (attn not in ("flash", "fused"), "is no attention for packed rows"),
        (dtype == torch.float32, "needs dtype = bf16"),
        (portability.builds_on_host(), "needs a GPU"),
        (not (is_real() or portability.has_no_memory()), "needs Transformer Engine, which is not installed here"),
    ):
        if condition:
            raise UserError(f"train.attention_backend = {attn}: {problem}; auto and sdpa run everywhere")
    return attn


def needs_torch_attention(attn: str, config: TransformerConfig) -> bool:
    """Return whether a model is built with torch's attention under `attn`, as `choose_attention` returned it.

    Transformer Engine (main branch of 2025, read) has no attention with sinks for packed rows, and none with windows
    where context-parallel ranks send keys in a ring, as they do by default.

    Raises:
        UserError: Transformer Engine's attention is requested, and it has none for this model.
    """
    missing = None
    if config.softmax_type != "vanilla":
        missing = "attention sinks"
    elif config.window_size is not None and config.context_parallel_size > 1:
        missing = "attention windows under context parallelism"
    if missing is not None and attn in ("flash", "fused"):
        raise UserError(f"train.attention_backend = {attn}: has no {missing} for packed rows; auto and sdpa have")
    return attn == "sdpa" or missing is not None


@contextlib.contextmanager
def torch_attention() -> Iterator[None]:
    """Build models inside with torch's attention, even where the real Transformer Engine is installed."""
    from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

    import megatron.core.extensions.transformer_engine_spec_provider as spec_provider

    installed = spec_provider.TEDotProductAttention
    spec_provider.TEDotProductAttention = TEDotProductAttention
    try:
        yield
    finally:
        spec_provider.TEDotProductAttention = installed


@contextlib.contextmanager
def fused_adam_importable() -> Iterator[None]:
    """Let Megatron-Core build its optimizer inside with the fallback of FusedAdam, where the real one is missing.

    Other optimizers are built without it: torch's own Adam is faster.
    """
    if is_real():
        yield
        return
    from megatron_gkd.runtime.transformer_engine.fused_adam import FusedAdam

    import megatron.core.optimizer as optimizer

    module = types.ModuleType("transformer_engine.pytorch.optimizers")
    vars(module)["FusedAdam"] = FusedAdam
    before = optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER
    sys.modules[module.__name__] = module
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    try:
        yield
    finally:
        del sys.modules[module.__name__]
        optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = before


def _is_fallback_installed() -> bool:
    return getattr(sys.modules.get("transformer_engine"), "is_pytorch_fallback", False)


def _replace_in_megatron(classes: dict[str, type], fused_mlp: type) -> None:
    """Set `classes` in all modules of Megatron-Core that import these names under `try` at import time."""
    from packaging.version import Version

    import megatron.core.extensions.transformer_engine_spec_provider as spec_provider
    import megatron.core.models.gpt.gpt_layer_specs as layer_specs
    import megatron.core.models.gpt.moe_module_specs  # noqa: F401  (imports names to be replaced below)
    import megatron.core.transformer.transformer_block as transformer_block
    import megatron.core.utils as core_utils

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            for attribute, cls in classes.items():
                if attribute in vars(module):
                    setattr(module, attribute, cls)
    layer_specs.TENorm = transformer_block.LayerNormImpl = classes["TENorm"]
    layer_specs.TESpecProvider = spec_provider.TESpecProvider
    layer_specs.TEFusedMLP = fused_mlp
    layer_specs.is_te_min_version = spec_provider.is_te_min_version = lambda *args, **kwargs: True
    core_utils.get_te_version = spec_provider.get_te_version = lambda: Version(_VERSION)


def _register_package() -> None:
    """Register a package `transformer_engine`, which mcore-bridge imports by name and derives classes from."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.attention")
    root, pytorch, attention = modules = [types.ModuleType(name) for name in names]
    for module in modules:
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    vars(root).update(pytorch=pytorch, __version__=_VERSION, is_pytorch_fallback=True)
    vars(pytorch).update({name: type(name, (nn.Module,), {}) for name in _EMPTY_CLASSES}, attention=attention)
    vars(pytorch).update(fp8_autocast=_no_context, fp8_model_init=_no_context)
    vars(attention).update(apply_rotary_pos_emb=None, _SplitAlongDim=None)
    sys.modules.update({module.__name__: module for module in modules})


def _no_context(*args: object, **kwargs: object) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()

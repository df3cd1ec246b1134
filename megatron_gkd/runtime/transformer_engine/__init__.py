"""Torch stand-ins for the Transformer Engine classes that Megatron-Core's layer specs name.

Megatron's own "local" layer spec has no packed input and no context parallelism, and its MoE does not train with
tensor parallelism. With these stand-ins the Transformer Engine spec builds, trains and converts on a CPU, or on a GPU
without Transformer Engine. Where the real one is installed `install()` does nothing.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
import types

import torch
from torch import nn

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import portability

_VERSION = "2.8.0"  # the version that the stand-ins behave like


def install() -> bool:
    """Put the stand-ins in place, before mcore-bridge is imported. False where the real library serves."""
    if getattr(sys.modules.get("transformer_engine"), "is_stand_in", False):
        return True
    if importlib.util.find_spec("transformer_engine") is not None:
        return False

    import megatron.core.extensions.transformer_engine as extension

    from megatron_gkd.runtime.transformer_engine import attention, linear, norm

    stand_ins = {
        "TENorm": norm.TENorm,
        "TELinear": linear.TELinear,
        "TEColumnParallelLinear": linear.TEColumnParallelLinear,
        "TERowParallelLinear": linear.TERowParallelLinear,
        "TELayerNormColumnParallelLinear": linear.TELayerNormColumnParallelLinear,
        "TEGroupedLinear": linear.TEGroupedLinear,
        "TEColumnParallelGroupedLinear": linear.TEColumnParallelGroupedLinear,
        "TERowParallelGroupedLinear": linear.TERowParallelGroupedLinear,
        "TEDotProductAttention": attention.TEDotProductAttention,
    }
    for name, cls in stand_ins.items():
        setattr(extension, name, cls)
    if extension.TEFusedMLP is None:
        extension.TEFusedMLP = type("TEFusedMLP", (nn.Module,), {})
    _fill_modules_that_failed_to_import(extension, stand_ins)
    _register_package()
    return True


def is_real() -> bool:
    """Return whether the models' layers are those of the real Transformer Engine."""
    return not getattr(sys.modules.get("transformer_engine"), "is_stand_in", False) and (
        importlib.util.find_spec("transformer_engine") is not None
    )


def choose_attention(attn: str, dtype: torch.dtype) -> str:
    """Return the attention that a recipe's `attn` means for packed rows of `dtype`: auto, flash, fused or sdpa.

    Of Transformer Engine's implementations the unfused one has no packed rows, and the others no fp32: what is left of
    `auto` there is torch's.

    Raises:
        UserError: Transformer Engine's attention is asked for, and it can't run here.
    """
    if attn == "auto":
        return "sdpa" if dtype == torch.float32 else "auto"
    if attn == "sdpa":
        return attn
    for condition, problem in (
        (attn not in ("flash", "fused"), "is no attention for packed rows"),
        (dtype == torch.float32, "needs dtype = bf16"),
        (portability.builds_on_host(), "needs a GPU"),
        (not is_real(), "needs Transformer Engine, which is not installed here"),
    ):
        if condition:
            raise UserError(f"train.attention_backend = {attn}: {problem}; auto and sdpa run everywhere")
    return attn


@contextlib.contextmanager
def torch_attention():
    """Models built inside use torch's attention even where the real Transformer Engine is installed."""
    import megatron.core.extensions.transformer_engine_spec_provider as spec_provider

    from megatron_gkd.runtime.transformer_engine.attention import TEDotProductAttention

    installed = spec_provider.TEDotProductAttention
    spec_provider.TEDotProductAttention = TEDotProductAttention
    try:
        yield
    finally:
        spec_provider.TEDotProductAttention = installed


def _fill_modules_that_failed_to_import(extension, stand_ins: dict[str, type]) -> None:
    """Megatron's modules import these names under `try`, at import time: give them what they missed."""
    import megatron.core.extensions.transformer_engine_spec_provider as spec_provider
    import megatron.core.models.gpt.gpt_layer_specs as layer_specs
    import megatron.core.models.gpt.moe_module_specs  # noqa: F401  (imports names to be replaced below)
    import megatron.core.transformer.transformer_block as transformer_block
    import megatron.core.utils as core_utils
    from packaging.version import Version

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            for attribute, cls in stand_ins.items():
                if attribute in vars(module):
                    setattr(module, attribute, cls)
    layer_specs.TENorm = transformer_block.LayerNormImpl = stand_ins["TENorm"]
    layer_specs.TESpecProvider = spec_provider.TESpecProvider
    layer_specs.TEFusedMLP = extension.TEFusedMLP
    layer_specs.is_te_min_version = spec_provider.is_te_min_version = lambda *args, **kwargs: True
    core_utils.get_te_version = spec_provider.get_te_version = lambda: Version(_VERSION)


def _register_package() -> None:
    """mcore-bridge imports `transformer_engine` by name, and derives classes from what it finds there."""
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.attention")
    root, pytorch, attention = modules = [types.ModuleType(name) for name in names]
    for module in modules:
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
    for name in (
        "Linear",
        "LayerNormLinear",
        "RMSNorm",
        "LayerNorm",
        "GroupedLinear",
        "DotProductAttention",
        "LayerNormMLP",
        "TransformerLayer",
    ):
        setattr(pytorch, name, type(name, (nn.Module,), {}))
    pytorch.fp8_autocast = pytorch.fp8_model_init = lambda *args, **kwargs: contextlib.nullcontext()
    attention.apply_rotary_pos_emb = attention._SplitAlongDim = None
    root.pytorch, pytorch.attention = pytorch, attention
    root.__version__, root.is_stand_in = _VERSION, True
    sys.modules.update({module.__name__: module for module in modules})

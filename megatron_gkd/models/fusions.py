"""The choice of Megatron-Core's fused kernels for a model, by what is installed and what the model has."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from torch import nn

from megatron_gkd.errors import UserError
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.transformer_engine import is_real

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import moe_utils

Switch = Literal["auto", "on", "off"]

GRADIENT_KERNEL = "fused_weight_gradient_mlp_cuda"
"""Apex' module that adds the gradients of Megatron-Core's own linear layers to their buffers."""
MASKED_SOFTMAX_KERNELS = ("scaled_masked_softmax_cuda", "scaled_upper_triang_masked_softmax_cuda")
"""Apex' modules that Megatron-Core imports where it computes a fused softmax."""
_PERMUTATIONS = (
    "fused_permute",
    "fused_permute_with_probs",
    "fused_sort_chunks_by_index",
    "fused_sort_chunks_by_index_with_probs",
    "fused_unpermute",
)
_NO_TRANSFORMER_ENGINE = "needs Transformer Engine, which is not installed here"


@dataclass(frozen=True)
class FusionSwitches:
    """The recipe's keys of the same names. The default is without any kernel that is not torch's."""

    gradient_accumulation_fusion: Switch = "off"
    masked_softmax_fusion: Switch = "off"
    bias_swiglu_fusion: Switch = "off"
    apply_rope_fusion: Switch = "off"
    moe_permute_fusion: Switch = "off"


def choose_fusions(switches: FusionSwitches, family: Mapping[str, Any], *, is_trained: bool) -> dict[str, bool]:
    """Return Megatron-Core's fields of the fused kernels.

    Args:
        switches: the recipe's.
        family: the settings of the model's configuration that follow from its checkpoint.
        is_trained: whether the model has gradients; without them there is nothing to accumulate.

    Raises:
        UserError: a kernel is requested that is not installed, or that a model in training can't use.
    """
    missing = {
        "gradient_accumulation_fusion": _missing_gradient_accumulation(),
        "masked_softmax_fusion": _missing_masked_softmax(),
        "bias_swiglu_fusion": None,
        "apply_rope_fusion": _missing_rope(),
        "moe_permute_fusion": _missing_permutation(),
    }
    unsuited = {
        "bias_swiglu_fusion": _describe_activation(family),
        "apply_rope_fusion": _describe_rope(family),
        "moe_permute_fusion": None if family.get("num_moe_experts") else "the model has no experts",
    }
    chosen = {}
    for field in fields(switches):
        name = field.name
        switch, problem, reason = getattr(switches, name), missing[name], unsuited.get(name)
        if is_trained and name != "moe_permute_fusion":  # which student or teacher alone may need
            problem = problem or reason
        if switch == "on" and problem is not None:
            raise UserError(f"megatron.{name} = on: {problem}; it must be auto or off")
        can_run = problem is None and reason is None
        chosen[name] = can_run and (switch == "on" or (switch == "auto" and _pays(name)))
    chosen["gradient_accumulation_fusion"] &= is_trained
    chosen["bias_activation_fusion"] = chosen.pop("bias_swiglu_fusion")  # the recipe's name is Megatron's argument
    return chosen


def describe_fusions(config: TransformerConfig) -> str:
    """Return the fused kernels of a built model in words; mcore-bridge may have switched one off."""
    names = {
        "gradient accumulation": config.gradient_accumulation_fusion,
        "masked softmax": config.masked_softmax_fusion,
        "SwiGLU": config.bias_activation_fusion,
        "rotary embeddings": config.apply_rope_fusion,
        "permutation for experts": config.moe_permute_fusion,
    }
    return ", ".join(name for name, is_on in names.items() if is_on) or "none"


@contextlib.contextmanager
def lifted_head_refusal(config: TransformerConfig) -> Iterator[None]:
    """Build models inside without Apex' kernel for the gradient of the head, whose product the loss computes itself.

    Megatron-Core 0.16 refuses to build the head where gradients are accumulated in Transformer Engine's kernels and
    Apex is not installed.
    """
    before = getattr(layers, "_grad_accum_fusion_available", True)
    layers._grad_accum_fusion_available = before or config.gradient_accumulation_fusion
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = before


@contextlib.contextmanager
def unfused_rope(chunks: Iterable[nn.Module]) -> Iterator[None]:
    """Compute rotary embeddings from the positions inside.

    The fused kernel counts them from the start of each packed sequence, which is wrong for tokens that continue one.
    """
    found = (getattr(module, "config", None) for chunk in chunks for module in chunk.modules())
    configs: dict[int, Any] = {id(config): config for config in found if getattr(config, "apply_rope_fusion", False)}
    for config in configs.values():
        config.apply_rope_fusion = False
    try:
        yield
    finally:
        for config in configs.values():
            config.apply_rope_fusion = True


def _pays(name: str) -> bool:
    """Return whether a kernel that can run is faster: without a GPU, torch compiles none for SwiGLU."""
    return name != "bias_swiglu_fusion" or not portability.builds_on_host()


def _missing_gradient_accumulation() -> str | None:
    if is_real() or importlib.util.find_spec(GRADIENT_KERNEL) is not None:
        return None
    return f"needs Transformer Engine or Apex' kernel {GRADIENT_KERNEL}, which are not installed here"


def _missing_masked_softmax() -> str | None:
    missing = [name for name in MASKED_SOFTMAX_KERNELS if importlib.util.find_spec(name) is None]
    return f"needs Apex' kernel {missing[0]}, which is not installed here" if missing else None


def _describe_activation(family: Mapping[str, Any]) -> str | None:
    name = family.get("hf_model_type", "the model")
    if not family.get("swiglu", True):
        return f"the activation of {name} is not SwiGLU"
    if family.get("activation_func_clamp_value") is not None or family.get("glu_linear_offset"):
        return f"the kernel does not limit or shift its inputs, as {name} does"
    return None


def _missing_rope() -> str | None:
    return None if is_real() and rope_utils.fused_apply_rotary_pos_emb_thd is not None else _NO_TRANSFORMER_ENGINE


def _describe_rope(family: Mapping[str, Any]) -> str | None:
    kinds = {
        "multi_latent_attention": "multi-latent attention",
        "rotary_interleaved": "interleaved rotary embeddings",
        "mrope_section": "rotary embeddings of several positions",
    }
    for name, kind in kinds.items():
        if family.get(name):
            return f"the kernel for packed rows has no {kind}, which {family.get('hf_model_type', 'the model')} has"
    return None


def _missing_permutation() -> str | None:
    missing = any(getattr(moe_utils, name, None) is None for name in _PERMUTATIONS)
    return "needs Transformer Engine 2.1 or newer, which is not installed here" if missing else None

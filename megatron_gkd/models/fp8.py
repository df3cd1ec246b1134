"""Whether a model's linear layers can be computed in FP8 here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from megatron_gkd.config.fp8 import fp8_multiple
from megatron_gkd.errors import UserError
from megatron_gkd.models.module_options import Fp8Options
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout
from megatron_gkd.runtime.transformer_engine import is_real

_CAPABILITIES = {"tensorwise": (8, 9), "delayed": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""The least compute capability of each recipe, by Transformer Engine's documentation."""


def choose_fp8(
    options: Fp8Options | None, family: Mapping[str, Any], dtype: torch.dtype, layout: Layout
) -> dict[str, Any]:
    """Return Megatron-Core's fields of FP8.

    Args:
        options: the recipe's; None for no FP8.
        family: the settings of the model's configuration that follow from its checkpoint.
        dtype: of the parameters.
        layout: how the model is sharded.

    Raises:
        UserError: it can't run here, or with this model.
    """
    if options is None:
        return {}
    least = _CAPABILITIES[options.recipe]
    found = portability.compute_capability()
    needs = f"needs Transformer Engine and a GPU of compute capability {least[0]}.{least[1]} or higher"
    key = f"{options.key} = {options.format}"
    if not is_real() or found is None:
        raise UserError(f"{key}: {needs}, which are not here; leave it out to compute in train.dtype")
    if found < least:
        raise UserError(f"{key}: {needs} for the recipe {options.recipe}; this one has {found[0]}.{found[1]}")
    if dtype != torch.bfloat16:
        raise UserError(f"{key}: needs train.dtype = bf16")
    multiple = fp8_multiple(options.recipe)
    for name, size in _sharded_sizes(family, layout).items():
        if size % multiple:
            raise UserError(f"{key}: {name} of the model = {size} on each rank; FP8 needs a multiple of {multiple}")
    return {"fp8": options.format, "fp8_recipe": options.recipe}


def _sharded_sizes(family: Mapping[str, Any], layout: Layout) -> dict[str, int]:
    """Return the widths of the model's linear layers on a rank that its checkpoint determines, by name."""
    sizes = {"the hidden size": family["hidden_size"]}
    if family.get("ffn_hidden_size"):
        sizes["the feed-forward size"] = family["ffn_hidden_size"] // layout.tensor
    if family.get("moe_ffn_hidden_size"):
        sizes["the experts' size"] = family["moe_ffn_hidden_size"] // layout.expert_tensor
    if family.get("kv_channels") and not family.get("multi_latent_attention"):
        heads = family["num_attention_heads"] // layout.tensor
        sizes["the size of all attention heads"] = heads * family["kv_channels"]
    return sizes

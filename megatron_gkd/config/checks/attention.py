"""Whether the attention that the recipe names can run. All batches are packed, which leaves few implementations."""

import importlib.util
import sys
from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe

_OF_TRANSFORMER_ENGINE = ("flash", "fused")


@check("attention_backend", "dtype")
def attention_fits_dtype(recipe: Recipe, _: int) -> Iterator[str]:
    """Find flash or fused attention with a type that it cannot compute in."""
    section = recipe.train
    if section.attention_backend in _OF_TRANSFORMER_ENGINE and section.dtype == "fp32":
        key = f"train.attention_backend = {section.attention_backend}"
        yield f"{key}: needs dtype = bf16; with dtype = fp32 it must be auto or sdpa"


@check("attention_backend", needs_files=True)
def transformer_engine_is_installed(recipe: Recipe, _: int) -> Iterator[str]:
    """Find flash or fused attention without the library that has them."""
    if recipe.train.attention_backend in _OF_TRANSFORMER_ENGINE and not has_transformer_engine():
        yield (
            f"train.attention_backend = {recipe.train.attention_backend}: needs Transformer Engine, which is not "
            "installed here (pip install transformer-engine[pytorch]); without it it must be auto or sdpa"
        )


def has_transformer_engine() -> bool:
    """Return whether Transformer Engine is installed, rather than its fallback."""
    if getattr(sys.modules.get("transformer_engine"), "is_pytorch_fallback", False):
        return False
    return importlib.util.find_spec("transformer_engine") is not None

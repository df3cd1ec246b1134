"""The recipe: one YAML file, typed and checked before any process group exists. Nothing in here imports torch."""

from megatron_gkd.config.errors import RecipeError
from megatron_gkd.config.load import load
from megatron_gkd.config.schema import Recipe

__all__ = ["Recipe", "RecipeError", "load"]

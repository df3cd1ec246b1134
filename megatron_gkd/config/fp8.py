"""The sizes of matrices and numbers of tokens that FP8's matrix products take."""

import math

from megatron_gkd.config.schema import Recipe


def fp8_multiple(recipe: str) -> int:
    """Return the number that divides every dimension of a matrix product with an `fp8_recipe`."""
    return 32 if recipe == "mxfp8" else 16


def fp8_token_multiple(recipe: Recipe) -> int:
    """Return the number that divides the tokens which a rank computes at once; 1 where nothing is computed in FP8.

    Student and teachers read the same microbatches.
    """
    section = recipe.megatron
    recipes = [] if section.fp8_format is None else [section.fp8_recipe]
    for teacher in recipe.teacher.all.values():
        if teacher.source == "local" and teacher.teacher_fp8_format is not None:
            recipes.append(teacher.teacher_fp8_recipe)
    return math.lcm(*map(fp8_multiple, recipes))

"""Measure what a recipe's models need on each pipeline stage, from their configurations alone."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from megatron_gkd.config.schema import Recipe
from megatron_gkd.planning.costs import MeasureOptions, RankCosts
from megatron_gkd.runtime.meta_device import enter_meta_device


def measure(recipe: Recipe, world_size: int, options: MeasureOptions | None = None) -> list[RankCosts]:
    """Return the costs of one rank for each pipeline stage.

    The process must be one that has not imported Megatron-Core by any other way: it computes on the meta device
    afterwards. It needs neither weights nor a GPU.

    Args:
        recipe: whose models are local folders or hub ids; config.json alone is read.
        world_size: number of ranks, a multiple of those of a model.
        options: what is assumed beside the recipe.

    Raises:
        UserError: a model can't be built from its config.json, or not with this layout.
        RuntimeError: this process computes elsewhere already.
    """
    enter_meta_device()
    from megatron_gkd.planning.stages import measure_stages

    return measure_stages(recipe, world_size, options or MeasureOptions())


def measure_in_process(recipe: Recipe, world_size: int, options: MeasureOptions | None = None) -> list[RankCosts]:
    """Return what `measure` does, from a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, recipe, world_size, options).result()

"""Whether the data and plugins exist."""

from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.schema import Recipe


@check("dataset", needs_files=True)
def dataset_exists(recipe: Recipe, _: int) -> Iterator[str]:
    """Find training data that is not there."""
    yield from _missing("data.dataset", [entry.path for entry in recipe.data.dataset])


@check("val_dataset", needs_files=True)
def val_dataset_exists(recipe: Recipe, _: int) -> Iterator[str]:
    """Find validation data that is not there."""
    yield from _missing("data.val_dataset", [entry.path for entry in recipe.data.val_dataset])


@check("external_plugins", needs_files=True)
def plugins_exist(recipe: Recipe, _: int) -> Iterator[str]:
    """Find plugins that are not there."""
    for path in recipe.data.external_plugins:
        if not (path.endswith(".py") and Path(path).is_file()):
            yield f"data.external_plugins = {path}: must be a .py file that exists"


def _missing(key: str, paths: list[str]) -> Iterator[str]:
    yield from (f"{key} = {path}: must be a file or folder that exists" for path in paths if not Path(path).exists())


@check("min_pixels", "max_pixels")
def pixel_limits_are_a_range(recipe: Recipe, _: int) -> Iterator[str]:
    """Find limits of which the smaller is larger."""
    least, most = recipe.data.min_pixels, recipe.data.max_pixels
    if least is not None and most is not None and least > most:
        yield f"data.min_pixels = {least}: must not be above data.max_pixels = {most}"


@check("max_patches", "packing")
def patches_are_of_packed_microbatches(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a limit that would have no effect."""
    most, is_packed = recipe.data.max_patches, recipe.data.packing
    if most is not None and not is_packed:
        yield (
            f"data.max_patches = {most}: limits packed microbatches; set data.packing to true, or "
            "leave it out and set train.micro_batch_size"
        )

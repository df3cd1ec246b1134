"""Whether the data and plugins exist."""

import glob
from collections.abc import Iterator
from pathlib import Path

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.dataset_names import ENDINGS, DatasetName, file_ending, file_kind, without_size
from megatron_gkd.config.schema import DatasetEntry, Recipe
from megatron_gkd.config.system_text import read_system
from megatron_gkd.errors import UserError


@check("dataset", needs_files=True)
def dataset_exists(recipe: Recipe, _: int) -> Iterator[str]:
    """Find training data that is not there."""
    yield from _unreadable("data.dataset", recipe.data.dataset)


@check("val_dataset", needs_files=True)
def val_dataset_exists(recipe: Recipe, _: int) -> Iterator[str]:
    """Find validation data that is not there."""
    yield from _unreadable("data.val_dataset", recipe.data.val_dataset)


@check("external_plugins", needs_files=True)
def plugins_exist(recipe: Recipe, _: int) -> Iterator[str]:
    """Find plugins that are not there."""
    for path in recipe.data.external_plugins:
        if not (path.endswith(".py") and Path(path).is_file()):
            yield f"data.external_plugins = {path}: must be a .py file that exists"


@check("system", needs_files=True)
def system_is_readable(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a system message that is a file which is not there."""
    try:
        read_system(recipe.data.system)
    except UserError as error:
        yield str(error)


def _unreadable(key: str, entries: tuple[DatasetEntry, ...]) -> Iterator[str]:
    """Find names that are wrong, and paths and patterns without files; ids and URLs are not looked up."""
    for entry in entries:
        try:
            name = DatasetName.parse(entry.path)
        except ValueError as error:
            yield f"{key} = {entry.path}: {error}"
            continue
        path = Path(name.location)
        if name.kind == "pattern" and not glob.glob(name.location, recursive=True):
            yield f"{key} = {entry.path}: no file matches this pattern"
        if name.kind != "path":
            continue
        if path.is_file() and file_kind(path.name) is None:
            yield f"{key} = {entry.path}: unknown kind of file; allowed are {ENDINGS}"
        elif not path.exists():
            hub = "" if file_ending(name.location) else ", or a hub id (owner/name[:subset][:split])"
            yield f"{key} = {entry.path}: must be a file or folder that exists{hub}"


@check("split_dataset_ratio", "val_dataset", "dataset")
def validation_rows_are_of_one_place(recipe: Recipe, _: int) -> Iterator[str]:
    """Find validation rows that are named and drawn, or drawn from a source that trains elsewhere, too."""
    ratio, entries = recipe.data.split_dataset_ratio, recipe.data.dataset
    if not ratio:
        return
    key = f"data.split_dataset_ratio = {ratio}"
    if recipe.data.val_dataset:
        yield f"{key}: must be 0 with data.val_dataset, which has the validation rows"
    names = [without_size(entry.path) for entry in entries]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield (
            f"{key}: data.dataset names {name} {names.count(name)} times, so that validation rows of one would be "
            "trained on by another; name it once, with a weight"
        )


@check("columns", "dataset", "val_dataset")
def columns_get_names_of_their_own(recipe: Recipe, _: int) -> Iterator[str]:
    """Find two columns with one new name."""
    data = recipe.data
    renamed = {"data.columns": data.columns}
    for leaf in ("dataset", "val_dataset"):
        renamed |= {f"data.{leaf}[{i}].columns": one.columns or {} for i, one in enumerate(getattr(data, leaf))}
    for key, columns in renamed.items():
        new = list(columns.values())
        for name in sorted({name for name in new if new.count(name) > 1}):
            old = ", ".join(column for column, to in columns.items() if to == name)
            yield f"{key} = {columns}: {name} is the new name of {old}; must be that of one of them"


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


@check("truncation_strategy", "lmbda", "streaming")
def split_rows_are_trained_on_as_they_are(recipe: Recipe, _: int) -> Iterator[str]:
    """Find rows that are split, where the student responds to prompts or where each row is one sequence."""
    if recipe.data.truncation_strategy == "split":
        if recipe.distill.lmbda > 0:
            yield (
                f"data.truncation_strategy = split: needs distill.lmbda = 0, not {recipe.distill.lmbda:g}: the pieces "
                "of a text have no prompts; use delete, left or right"
            )
        if recipe.data.streaming:
            yield "data.truncation_strategy = split: not with data.streaming, where a row is one sequence"

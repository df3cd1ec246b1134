"""Keys of streamed rows, and of rows that are grouped by their lengths."""

import os
from collections.abc import Iterator

from megatron_gkd.config.checks.registry import check
from megatron_gkd.config.dataset_names import without_size
from megatron_gkd.config.schema import DataSection, Recipe

DEFAULT_BUFFER = DataSection.model_fields["shuffle_buffer_size"].default


@check("streaming", "num_train_epochs")
def streamed_runs_have_steps(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a length in passes over rows whose number is not known."""
    epochs = recipe.train.num_train_epochs
    if recipe.data.streaming and epochs is not None:
        yield (
            f"train.num_train_epochs = {epochs:g}: the number of rows is not known with data.streaming; set "
            "train.train_iters in its place"
        )


@check("streaming", "split_dataset_ratio")
def streams_are_not_split(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a share of rows whose number is not known."""
    ratio = recipe.data.split_dataset_ratio
    if recipe.data.streaming and ratio > 0:
        yield (
            f"data.split_dataset_ratio = {ratio:g}: the number of rows is not known with data.streaming; name the "
            "validation rows in data.val_dataset"
        )


@check("streaming", "prompt_only", "lmbda")
def streamed_rows_have_responses(recipe: Recipe, _: int) -> Iterator[str]:
    """Find prompts alone in steps that the student does not sample: no row to take their place is known."""
    lmbda = recipe.distill.lmbda
    if recipe.data.streaming and recipe.data.prompt_only == "on_policy_only" and 0 < lmbda < 1:
        yield (
            f"data.prompt_only = on_policy_only: with data.streaming and distill.lmbda = {lmbda:g}, rows that could "
            "take the place of prompts are not known; set distill.lmbda = 1, or data.streaming to false"
        )


@check("streaming", "dataset", needs_files=True)
def streams_are_read_whole(recipe: Recipe, _: int) -> Iterator[str]:
    """Find rows that could only be drawn from all rows of a source."""
    for entry in recipe.data.dataset if recipe.data.streaming else ():
        if not os.path.exists(entry.path) and without_size(entry.path) != entry.path:
            yield (
                f"data.dataset = {entry.path}: data.streaming reads a source from its start, and can't draw "
                f"{entry.path.rpartition('#')[2]} of its rows; leave out #n, or set data.streaming to false"
            )


@check("streaming", "preprocessing_num_workers", "val_dataset")
def streams_have_other_workers(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a number of processes without work."""
    data = recipe.data
    if data.streaming and data.preprocessing_num_workers is not None and not data.val_dataset:
        yield (
            f"data.preprocessing_num_workers = {data.preprocessing_num_workers}: with data.streaming, rows are "
            "tokenized by data.dataloader_num_workers processes; set that key"
        )


@check("shuffle_buffer_size", "streaming", "shuffle")
def buffer_is_of_shuffled_streams(recipe: Recipe, _: int) -> Iterator[str]:
    """Find a buffer that would have no effect."""
    data = recipe.data
    if data.shuffle_buffer_size == DEFAULT_BUFFER or (data.streaming and data.shuffle):
        return
    yield f"data.shuffle_buffer_size = {data.shuffle_buffer_size}: needs data.streaming and data.shuffle = true"


@check("group_by_length", "num_generations")
def steps_have_rows_of_their_own(recipe: Recipe, _: int) -> Iterator[str]:
    """Find steps that several completions of a prompt are spread over, whatever its length."""
    count = recipe.rollout.num_generations
    if recipe.data.group_by_length and count > 1:
        yield (
            f"data.group_by_length = true: with rollout.num_generations = {count}, the completions of a prompt are "
            "spread over the steps of a generation; set one of the two"
        )


@check("group_by_length", "streaming", "shuffle", "packing")
def rows_can_be_grouped(recipe: Recipe, _: int) -> Iterator[str]:
    """Find rows whose steps can't be chosen by length, or need not be."""
    data = recipe.data
    if not data.group_by_length:
        return
    if data.streaming:
        yield "data.group_by_length = true: lengths are not known ahead with data.streaming; set one of the two"
    if not data.shuffle:
        yield "data.group_by_length = true: needs data.shuffle = true, since it changes the order of the rows"
    if data.packing:
        yield (
            "data.group_by_length = true: rows of one length pack worse than rows of several, and data.packing already "
            "fills microbatches and balances ranks; set one of the two"
        )

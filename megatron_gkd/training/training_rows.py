"""The training rows of a run: tokenized before it, or streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron_gkd.config.schema import Recipe
from megatron_gkd.config.system_text import read_system
from megatron_gkd.data.generation_order import GenerationOrder
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.length_order import LengthGroupedOrder
from megatron_gkd.data.loader import IndexedSamples, StepOrder
from megatron_gkd.data.off_policy_rows import OffPolicyRows
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.report import DataReport
from megatron_gkd.data.streams.feed import StreamState
from megatron_gkd.data.streams.opening import Streams
from megatron_gkd.data.streams.streamed_rows import NextRows, StreamedRows, StreamProgress
from megatron_gkd.reporting.start_report import RowsLine
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.training.checkpointing.identity import rows_identity, streams_identity
from megatron_gkd.training.checkpointing.resume import ResumePoint
from megatron_gkd.training.describe_rows import describe_rows, log_first_rows
from megatron_gkd.training.setup import Models, open_rows, row_options
from megatron_gkd.training.streamed_row_checks import StreamedRowChecks
from megatron_gkd.training.teacher_rows import (
    check_training_rows,
    has_images,
    require_cached_rows,
    require_few_images,
    require_readers_of_videos,
)

EpochOrder = SampleOrder | LengthGroupedOrder | GenerationOrder


@dataclass(frozen=True)
class TrainingRows:
    """The training rows, and which of them each step has.

    Attributes:
        samples: the rows.
        order: which rows a step has.
        stream: the same object where the rows are streamed; None where they are tokenized.
    """

    samples: IndexedSamples
    order: StepOrder
    stream: StreamedRows | None = None


@dataclass(frozen=True)
class OpenedRows:
    """Training rows that are opened, and of which no step is read yet.

    Attributes:
        identity: what must be the same for a resumed run.
        order: of the rows of whole epochs; None where the number of rows is not known.
        line: their line in the report at the start.
        report: counts of the rows; None where they are not known yet.
        has_images: whether a row has images, or may have some.
        begin: returns the rows of a run that is resumed from a checkpoint; None for a new run.
    """

    identity: dict[str, Any]
    order: EpochOrder | None
    line: RowsLine
    report: DataReport | None
    has_images: bool
    begin: Callable[[ResumePoint | None], TrainingRows]


def open_training_rows(recipe: Recipe, models: Models) -> OpenedRows:
    """Open the training rows, and check those that are tokenized. All ranks must call it.

    Raises:
        UserError: in all ranks; a source can't be read, a row is bad, or can't be used by this run.
    """
    return _open_streams(recipe, models) if recipe.data.streaming else _open_tokenized(recipe, models)


def _open_tokenized(recipe: Recipe, models: Models) -> OpenedRows:
    dataset, report = open_rows(recipe, models, "train")
    check_training_rows(recipe.teacher, dataset, models.teachers)
    require_readers_of_videos(recipe, dataset)
    if recipe.distill.lmbda > 0:
        require_few_images(recipe, dataset)
    require_cached_rows(recipe.teacher, dataset, "data.dataset")
    weights = [entry.weight for entry in recipe.data.dataset]
    seed = recipe.train.seed
    sequence = partial(SampleOrder, dataset.sizes, weights, seed, recipe.data.shuffle)
    epochs, schedule = sequence(), LambdaSchedule.from_recipe(recipe)
    order: EpochOrder = epochs
    if recipe.data.group_by_length:
        order = LengthGroupedOrder(epochs, dataset.lengths, seed, recipe.train.global_batch_size)
    elif recipe.rollout.num_generations > 1:
        order = GenerationOrder(epochs, schedule, recipe.train.global_batch_size)
    step_order: StepOrder = order
    if recipe.distill.lmbda < 1 and not dataset.num_labels.all():  # prompts alone, which off-policy steps can't use
        step_order = OffPolicyRows(order, sequence(), dataset.num_labels > 0, schedule)
    return OpenedRows(
        rows_identity(dataset, weights),
        order,
        describe_rows("training", dataset, report, models.tokenizer),
        report,
        has_images(dataset),
        lambda point: TrainingRows(dataset, step_order),
    )


def _open_streams(recipe: Recipe, models: Models) -> OpenedRows:
    """Open the streams on the main rank, which reads for all."""
    opened: list[Streams] = []

    def open_() -> tuple[list[str], dict[str, Any]]:
        options = row_options(recipe, models, "train")
        opened.append(Streams.open(recipe.data, models.tokenizer, options))
        return [source.identity for source in opened[0].sources], opened[0].preparation()

    identities, preparation = run_on_main(open_)
    streams = opened[0] if opened else None
    data = recipe.data
    order = f"each drawn from {data.shuffle_buffer_size}" if data.shuffle else "in order"
    sources = "1 source" if len(identities) == 1 else f"{len(identities)} sources"
    return OpenedRows(
        streams_identity(identities, preparation, [entry.weight for entry in data.dataset], read_system(data.system)),
        None,
        RowsLine("training", f"streamed from {sources}, {order}, and tokenized while training", None),
        None,
        models.images is not None,
        lambda point: _begin_streams(recipe, models, streams, point),
    )


def _begin_streams(recipe: Recipe, models: Models, streams: Streams | None, point: ResumePoint | None) -> TrainingRows:
    """Return the rows of `streams`, which only the main rank has, from where the checkpoint ends."""
    progress = StreamProgress(StreamState.at_start(len(recipe.data.dataset)))
    if point is not None:
        progress = StreamProgress.from_values(point.run["progress"]["stream"])
    batch = recipe.train.global_batch_size
    feed = None
    if streams is not None:
        checks = StreamedRowChecks.from_recipe(recipe, models.teachers)
        feed = streams.feed(
            progress.state,
            seed=recipe.train.seed,
            rows_ahead=2 * batch,
            find_problem=checks.find_problem,
            on_first=partial(log_first_rows, models.tokenizer),
        )
    order = None
    if recipe.rollout.num_generations > 1:
        order = GenerationOrder(NextRows(), LambdaSchedule.from_recipe(recipe), batch)
    rows = StreamedRows(feed, batch, progress, order=order, steps_per_generation=recipe.steps_per_generation)
    return TrainingRows(rows, rows, rows)

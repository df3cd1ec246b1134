"""The first part of a run: open its checkpoints and rows, and refuse what can't be trained before a model is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_gkd.config.schema import Recipe, TrainSection
from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.generation_order import GenerationOrder
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.errors import UserError
from megatron_gkd.models.export import try_companions
from megatron_gkd.reporting.start_report import RowsLine
from megatron_gkd.runtime.agreement import run_on_main
from megatron_gkd.runtime.disk import replace_text
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.build import DTYPES
from megatron_gkd.training.build_teacher import read_manifests
from megatron_gkd.training.checkpointing.folder import checkpoint_folder
from megatron_gkd.training.checkpointing.identity import (
    base_identity,
    revisions_identity,
    schedule_identity,
)
from megatron_gkd.training.checkpointing.resume import ResumePoint, find_resume_point
from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
from megatron_gkd.training.describe_rows import describe_rows
from megatron_gkd.training.ends import CompletionEnds
from megatron_gkd.training.setup import Models, open_models, open_rows, pad_token_id
from megatron_gkd.training.teacher_rows import (
    check_rows,
    has_images,
    require_cached_rows,
    require_readers_of_videos,
)
from megatron_gkd.training.training_rows import EpochOrder, TrainingRows, open_training_rows


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs to be assembled.

    Attributes:
        point: the checkpoint that the run is resumed from; None for a new run.
        models: the opened checkpoints of student and teachers.
        vocab_size: number of ids that the student and all teachers, cached ones too, have logits for.
        training: the training rows, and which of them each step has.
        validation: the validation rows; None where there are none.
        lines: what the report at the start says of the rows.
        epochs: passes over the training rows; None where their number is not known.
        has_images: whether a row has images, or may have some.
        batch_config: how a global batch is divided.
        lambda_schedule: which rows of a step the student completes.
        ends: what ends the student's completions.
        train_iters: number of steps.
        identity: what must be the same for a resumed run; see ``identity``.
    """

    point: ResumePoint | None
    models: Models
    vocab_size: int
    training: TrainingRows
    validation: TokenizedDataset | None
    lines: tuple[RowsLine, ...]
    epochs: float | None
    has_images: bool
    batch_config: BatchConfig
    lambda_schedule: LambdaSchedule
    ends: CompletionEnds
    train_iters: int
    identity: dict[str, Any]

    @property
    def has_teacher_prompts(self) -> bool:
        """Whether a training row has a prompt of its own for the teacher, or may have one."""
        samples = self.training.samples
        return not isinstance(samples, TokenizedDataset) or bool(samples.teacher_lengths.any())

    @property
    def last_step(self) -> int:
        """The newest step of the run that is resumed; 0 for a new run."""
        return 0 if self.point is None else self.point.step


def _begin_folder(recipe: Recipe) -> None:
    """Write the recipe into the run's folder, and make the folder of its checkpoints."""
    if recipe.output.save_interval is not None:
        checkpoint_folder(recipe).path.mkdir(exist_ok=True)
    replace_text(Path(recipe.output.output_dir) / "recipe.yaml", recipe.to_yaml())


def prepare(recipe: Recipe, mesh: Mesh) -> PreparedRun:
    """Open all that `recipe` names. All ranks must call it.

    Raises:
        UserError: in all ranks; the recipe's models, rows or checkpoint can't be used together.
    """
    apply_workarounds()
    point = find_resume_point(recipe)
    output_dir = Path(recipe.output.output_dir)
    models = open_models(recipe, mesh)
    try_companions(models.student, DTYPES[recipe.train.dtype], output_dir)
    manifests = read_manifests(recipe.teacher, models.tokenizer, models.images)
    training = open_training_rows(recipe, models)
    train_iters = _count_steps(recipe.train, training.order)
    identity = training.identity | schedule_identity(models.tokenizer, train_iters)
    identity |= revisions_identity(models.student, models.teachers)
    if recipe.lora is not None:
        identity |= base_identity(models.student.path)
    if point is not None:
        point.require_same(identity)
        point.require_steps(train_iters)
    lines, validation = [training.line], None
    if recipe.data.has_validation:
        validation, report = open_rows(recipe, models, "validation")
        check_rows(recipe.teacher, validation, models.teachers)
        require_readers_of_videos(recipe, validation)
        key = "data.val_dataset" if recipe.data.val_dataset else "data.split_dataset_ratio"
        require_cached_rows(recipe.teacher, validation, key)
        lines.append(describe_rows("validation", validation, report, models.tokenizer))
    # Not before: a run that is refused leaves the recipe of an earlier one.
    run_on_main(partial(_begin_folder, recipe), os_error=f"output.output_dir = {output_dir}: can't be written to")
    return PreparedRun(
        point=point,
        models=models,
        vocab_size=min([models.vocab_size, *(manifest.vocab_size for manifest in manifests)]),
        training=training.begin(point),
        validation=validation,
        lines=tuple(lines),
        epochs=_count_epochs(recipe.train, training.order, train_iters),
        has_images=training.has_images or (validation is not None and has_images(validation)),
        batch_config=BatchConfig.from_recipe(recipe, mesh, pad_token_id(models), models.images),
        lambda_schedule=LambdaSchedule.from_recipe(recipe),
        ends=CompletionEnds.find(recipe, models, training.report),
        train_iters=train_iters,
        identity=identity,
    )


def _count_steps(section: TrainSection, order: EpochOrder | None) -> int:
    """Return the number of steps of a run. `order`: of the rows; None where there is no end of an epoch."""
    if section.train_iters is not None:
        return section.train_iters
    if section.num_train_epochs is None or order is None:
        raise UserError("train.train_iters = null: the length of the run is not given; set it")
    num_rows = section.num_train_epochs * order.epoch_length
    if isinstance(order, GenerationOrder):
        return order.count_steps(num_rows)
    return math.ceil(num_rows / section.global_batch_size)


def _count_epochs(section: TrainSection, order: EpochOrder | None, train_iters: int) -> float | None:
    """Return the passes over the training rows; the arguments are as in `_count_steps`."""
    if order is None:
        return None
    if isinstance(order, GenerationOrder):
        return order.count_rows(train_iters) / order.epoch_length
    return train_iters * section.global_batch_size / order.epoch_length

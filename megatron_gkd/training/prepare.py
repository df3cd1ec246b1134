"""The first part of a run: open its checkpoints and rows, and refuse what can't be trained before a model is built."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_gkd.config.schema import Recipe, TrainSection
from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.dataset import TokenizedDataset
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.report import DataReport
from megatron_gkd.errors import UserError
from megatron_gkd.models.export import try_companions
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.training.build import DTYPES
from megatron_gkd.training.build_teacher import read_manifests
from megatron_gkd.training.checkpointing.identity import base_identity, data_identity
from megatron_gkd.training.checkpointing.resume import ResumePoint, find_resume_point
from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
from megatron_gkd.training.setup import Models, open_models, open_rows, pad_token_id
from megatron_gkd.training.teacher_rows import (
    check_rows,
    check_training_rows,
    has_images,
    require_cached_rows,
    require_readers_of_videos,
)


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs to be assembled.

    Attributes:
        point: the checkpoint that the run is resumed from; None for a new run.
        models: the opened checkpoints of student and teachers.
        vocab_size: number of ids that the student and all teachers, cached ones too, have logits for.
        rows: the rows and their report of each split that is read, `training` and `validation`.
        order: which training rows each step has.
        batch_config: how a global batch is divided.
        lambda_schedule: which rows of a step the student completes.
        train_iters: number of steps.
        identity: what must be the same for a resumed run; see ``identity``.
    """

    point: ResumePoint | None
    models: Models
    vocab_size: int
    rows: dict[str, tuple[TokenizedDataset, DataReport]]
    order: SampleOrder
    batch_config: BatchConfig
    lambda_schedule: LambdaSchedule
    train_iters: int
    identity: dict[str, Any]

    @property
    def training(self) -> TokenizedDataset:
        """The training rows."""
        return self.rows["training"][0]

    @property
    def validation(self) -> TokenizedDataset | None:
        """The validation rows; None where there are none."""
        return self.rows["validation"][0] if "validation" in self.rows else None

    @property
    def has_images(self) -> bool:
        """Whether a row has images."""
        return any(has_images(dataset) for dataset, _ in self.rows.values())

    @property
    def last_step(self) -> int:
        """The newest step of the run that is resumed; 0 for a new run."""
        return 0 if self.point is None else self.point.step


def prepare(recipe: Recipe, mesh: Mesh) -> PreparedRun:
    """Open all that `recipe` names. All ranks must call it.

    Raises:
        UserError: in all ranks; the recipe's models, rows or checkpoint can't be used together.
    """
    apply_workarounds()
    point = find_resume_point(recipe)
    output_dir = Path(recipe.output.output_dir)
    if mesh.is_main:
        (output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    models = open_models(recipe, mesh)
    try_companions(models.student, DTYPES[recipe.train.dtype], output_dir)
    manifests = read_manifests(recipe.teacher, models.tokenizer, models.images)
    training, report = open_rows(recipe, models, "train", prompts=recipe.distill.lmbda == 1)
    check_training_rows(recipe.teacher, training, models.teachers)
    require_readers_of_videos(recipe, training)
    require_cached_rows(recipe.teacher, training, "data.dataset")
    order = SampleOrder(
        training.sizes, [entry.weight for entry in recipe.data.dataset], recipe.train.seed, recipe.data.shuffle
    )
    train_iters = _count_steps(recipe.train, order.epoch_length)
    identity = data_identity(training, models.tokenizer, train_iters)
    if recipe.lora is not None:
        identity |= base_identity(models.student.path)
    if point is not None:
        point.require_same(identity)
    rows = {"training": (training, report)}
    if recipe.data.val_dataset:
        rows["validation"] = open_rows(recipe, models, "validation")
        check_rows(recipe.teacher, rows["validation"][0], models.teachers)
        require_readers_of_videos(recipe, rows["validation"][0])
        require_cached_rows(recipe.teacher, rows["validation"][0], "data.val_dataset")
    return PreparedRun(
        point=point,
        models=models,
        vocab_size=min([models.vocab_size, *(manifest.vocab_size for manifest in manifests)]),
        rows=rows,
        order=order,
        batch_config=BatchConfig.from_recipe(recipe, mesh, pad_token_id(models), models.images),
        lambda_schedule=LambdaSchedule(recipe.distill.lmbda, recipe.distill.lmbda_granularity, recipe.train.seed),
        train_iters=train_iters,
        identity=identity,
    )


def _count_steps(section: TrainSection, epoch_length: int) -> int:
    """Return the number of steps of a run. `epoch_length`: training rows in an epoch."""
    if section.train_iters is not None:
        return section.train_iters
    if section.num_train_epochs is None:
        raise UserError("train.train_iters = null: the length of the run is not given; set train.num_train_epochs")
    return math.ceil(section.num_train_epochs * epoch_length / section.global_batch_size)

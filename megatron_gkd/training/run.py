"""From a validated recipe to a finished run: build every part, train, clean up."""

from __future__ import annotations

import contextlib
import math
import os
from functools import partial
from pathlib import Path

import megatron_gkd.runtime.preload  # noqa: F401  isort: skip  (before anything that imports Megatron-Core)

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.batch_config import BatchConfig
from megatron_gkd.data.lambda_schedule import LambdaSchedule
from megatron_gkd.data.loader import StepLoader, validation_batches
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.models.export import try_companions
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.signals import StopSignals
from megatron_gkd.runtime.time_limit import TimeLimit
from megatron_gkd.teachers.base import ScoresAhead
from megatron_gkd.training.build import DTYPES, build_rollouts, build_student
from megatron_gkd.training.build_teacher import (
    averages_of,
    begins_as_student,
    build_teacher,
    check_rows,
    check_tags,
    read_manifests,
    require_cached_rows,
)
from megatron_gkd.training.checkpointing.folder import checkpoint_folder
from megatron_gkd.training.checkpointing.identity import base_identity, data_identity, recipe_identity
from megatron_gkd.training.checkpointing.loader import load, load_weights
from megatron_gkd.training.checkpointing.resume import find_checkpoint, find_resume_point
from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
from megatron_gkd.training.checkpointing.saver import Saver
from megatron_gkd.training.checkpointing.state import Saved
from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
from megatron_gkd.training.completion_recorder import CompletionRecorder
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.interruptions import Interruptions
from megatron_gkd.training.metrics import Reporter
from megatron_gkd.training.run_folder import RunFolder
from megatron_gkd.training.setup import open_models, open_rows, pad_token_id, world_of
from megatron_gkd.training.start import Schedule, describe_start
from megatron_gkd.training.trainer import Trainer


def train(recipe: Recipe) -> None:
    """Run `recipe` in the world that torchrun describes (one process without it)."""
    folder = RunFolder(Path(recipe.output.output_dir), is_main=int(os.environ.get("RANK", "0")) == 0)
    with StopSignals(folder.leave) as signals, world_of(recipe) as mesh, folder:
        _train(recipe, mesh, folder, signals)


def _train(recipe: Recipe, mesh: Mesh, folder: RunFolder, signals: StopSignals | None = None) -> None:
    output_dir = folder.path
    apply_workarounds()
    point = find_resume_point(recipe)
    if mesh.is_main:
        (output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    models = open_models(recipe, mesh)
    try_companions(models.student, DTYPES[recipe.train.dtype], output_dir)
    manifests = read_manifests(recipe.teacher, models.tokenizer)
    vocab_size = min([models.vocab_size, *(manifest.vocab_size for manifest in manifests)])

    dataset, data_report = open_rows(recipe, mesh, models, "train", prompts=recipe.distill.lmbda == 1)
    check_rows(recipe.teacher, dataset)
    require_cached_rows(recipe.teacher, dataset, "data.dataset")
    order = SampleOrder(
        dataset.sizes, [entry.weight for entry in recipe.data.dataset], recipe.train.seed, recipe.data.shuffle
    )
    train_iters = recipe.train.train_iters or math.ceil(
        recipe.train.num_train_epochs * order.epoch_length / recipe.train.global_batch_size
    )
    identity = data_identity(dataset, models.tokenizer, train_iters)
    if recipe.lora is not None:
        identity |= base_identity(models.student.path)
    if point is not None:
        point.require_same(identity)
    first_step = 0 if point is None else point.step
    config = BatchConfig.from_recipe(recipe, mesh, pad_token_id(models))
    lambda_schedule = LambdaSchedule(recipe.distill.lmbda, recipe.distill.lmbda_granularity, recipe.train.seed)
    batches = StepLoader(
        dataset,
        order,
        config,
        range(first_step + 1, train_iters + 1),
        num_workers=recipe.data.dataloader_num_workers,
        skip=partial(lambda_schedule.any, count=recipe.train.global_batch_size),
    )
    rows, validation = {"training": (dataset, data_report)}, None
    if recipe.data.val_dataset:
        rows["validation"] = held_out, _ = open_rows(recipe, mesh, models, "validation")
        check_tags(recipe.teacher, held_out)
        require_cached_rows(recipe.teacher, held_out, "data.val_dataset")
        validation = validation_batches(held_out, config, recipe.train.eval_iters)

    student = build_student(recipe, mesh, models.student, vocab_size, train_iters)
    teacher = build_teacher(recipe, mesh, student, models.teachers)
    rollouts = None
    if recipe.distill.lmbda > 0:
        on_sample = (lambda sample: teacher.begin([sample])) if isinstance(teacher, ScoresAhead) else None
        rollouts = build_rollouts(
            recipe, mesh, student, models.student, lambda_schedule, dataset, order, config, train_iters, on_sample
        )
    output = recipe.output
    completions = None
    if rollouts is not None and output.log_completions:
        completions = CompletionRecorder(mesh, models.tokenizer, output.log_completions_interval)
    saved = Saved(student, averages_of(teacher), output.save_optim)
    if point is not None:
        load(saved, point.path, point.step)
    elif recipe.train.init_from is not None:
        load_weights(saved, find_checkpoint(recipe.train.init_from))
    closing = contextlib.nullcontext() if rollouts is None else contextlib.closing(rollouts)
    reporter = Reporter(
        output_dir, train_iters, output, is_main=mesh.is_main, last_step=None if point is None else point.step
    )
    with closing, reporter:
        saver = Saver(
            checkpoint_folder(recipe),
            is_asynchronous=output.async_save,
            most=output.save_total_limit,
            report=reporter.message,
        )
        checkpoints = None
        if output.save_interval is not None:
            checkpoints = RunCheckpoints(saver, saved, output.save_interval, recipe_identity(recipe) | identity)
        limit = None
        if recipe.train.max_runtime is not None:
            limit = TimeLimit(recipe.train.max_runtime, longest_save=lambda: saver.longest)
        trainer = Trainer(
            student,
            teacher,
            batches,
            validation,
            reporter,
            rollouts=rollouts,
            completions=completions,
            mismatch_kl_threshold=recipe.rollout.mismatch_kl_threshold,
            teacher_is_student=recipe.train.init_from is None
            and (recipe.lora is None or recipe.lora.adapters is None)
            and begins_as_student(recipe.teacher, models.student, models.teachers),
            train_iters=train_iters,
            eval_interval=recipe.train.eval_interval,
            exports=exports_of(recipe),
            max_bad_steps=recipe.train.max_bad_steps,
            checkpoints=checkpoints,
            interruptions=Interruptions(signals, limit),
        )
        folder.step = lambda: trainer.state.step
        if point is not None:
            trainer.restore(point.run["progress"])
            for warning in point.warnings:
                reporter.message(f"warning: {warning}")
        schedule = Schedule(train_iters, order.epoch_length, point)
        reporter.start(describe_start(recipe, models, student.model, rows, schedule))
        exported = trainer.run()
        reporter.message(
            f"{exported.describe()}\nmetrics    {output_dir / 'metrics.jsonl'}\ncurves     {reporter.plot()}"
        )


def exports_of(recipe: Recipe) -> Exports:
    """Return where and when a run exports: adapters, if it trains them, and whole checkpoints."""
    output, lora = recipe.output, recipe.lora
    return Exports(
        Path(output.output_dir),
        output.export_interval,
        output.export_total_limit,
        has_checkpoint=lora is None or lora.merge_lora,
        has_adapters=lora is not None,
    )

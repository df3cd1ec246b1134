"""From a validated recipe to a finished run: build every part, train, clean up."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from functools import partial
from pathlib import Path

import megatron_gkd.runtime.preload  # noqa: F401  isort: skip  (before anything that imports Megatron-Core)

import torch.distributed as dist

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.dataset import build_dataset
from megatron_gkd.data.loader import StepLoader, validation_batches
from megatron_gkd.data.order import SampleOrder
from megatron_gkd.data.policy import OnPolicy
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout, Mesh, destroy_mesh, initialize_mesh
from megatron_gkd.teachers.base import ScoresAhead
from megatron_gkd.training.build import batching, build_rollouts, build_student
from megatron_gkd.training.build_teacher import (
    begins_as_student,
    build_teacher,
    check_rows,
    open_teachers,
    shared_vocab_size_of_all,
)
from megatron_gkd.training.completions import Completions
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.metrics import Reporter
from megatron_gkd.training.trainer import Trainer


def train(recipe: Recipe) -> None:
    """Run `recipe` in the world that torchrun describes (one process without it)."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    portability.select_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(portability.backend(), timeout=datetime.timedelta(minutes=30))
    try:
        mesh = initialize_mesh(Layout.from_section(recipe.parallel), recipe.train.seed)
        _train(recipe, mesh)
        destroy_mesh()
    finally:
        dist.destroy_process_group()


def _train(recipe: Recipe, mesh: Mesh) -> None:
    output_dir = Path(recipe.output.output_dir)
    if mesh.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    shared = {"main_process": mesh.is_main, "barrier": dist.barrier}
    student_checkpoint = Checkpoint.open(recipe.student.model, **shared)
    teacher_checkpoints = open_teachers(recipe.teacher, **shared)
    vocab_size = shared_vocab_size_of_all(student_checkpoint, teacher_checkpoints)

    tokenizer = student_checkpoint.tokenizer()
    prompts = recipe.distill.lmbda > 0
    shared |= {"tag_key": recipe.teacher.teacher_tag_key}
    dataset, data_report = build_dataset(recipe.data, "train", tokenizer, prompts=prompts, **shared)
    check_rows(recipe.teacher, dataset)
    order = SampleOrder(
        dataset.sizes, [entry.weight for entry in recipe.data.dataset], recipe.train.seed, recipe.data.shuffle
    )
    train_iters = recipe.train.train_iters or math.ceil(
        recipe.train.num_train_epochs * order.epoch_length / recipe.train.global_batch_size
    )
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    cut = batching(recipe, mesh, pad_token_id)
    policy = OnPolicy(recipe.distill.lmbda, recipe.distill.lmbda_granularity, recipe.train.seed)
    batches = StepLoader(
        dataset,
        order,
        **cut,
        num_workers=recipe.data.dataloader_num_workers,
        num_steps=train_iters,
        skip=partial(policy.any, count=recipe.train.global_batch_size),
    )
    validation = None
    if recipe.data.val_dataset:
        held_out, _ = build_dataset(recipe.data, "validation", tokenizer, **shared)
        validation = validation_batches(held_out, **cut, num_steps=recipe.train.eval_iters)

    student = build_student(recipe, mesh, student_checkpoint, vocab_size, train_iters)
    teacher = build_teacher(recipe, mesh, student, teacher_checkpoints)
    rollouts = None
    if recipe.distill.lmbda > 0:
        rollouts = build_rollouts(recipe, mesh, student, student_checkpoint, policy, dataset, order, cut, train_iters)
    output = recipe.output
    if rollouts is not None and isinstance(teacher, ScoresAhead):
        rollouts.on_sample = lambda sample: teacher.begin([sample])
    completions = None
    if rollouts is not None and output.log_completions:
        completions = Completions(mesh, tokenizer, output.log_completions_interval)
    closing = contextlib.nullcontext() if rollouts is None else contextlib.closing(rollouts)
    with closing, Reporter(output_dir, train_iters, output, is_main=mesh.is_main) as reporter:
        reporter.message(data_report.summary())
        exported = Trainer(
            student,
            teacher,
            batches,
            validation,
            reporter,
            rollouts=rollouts,
            completions=completions,
            mismatch_kl_threshold=recipe.rollout.mismatch_kl_threshold,
            teacher_is_student=begins_as_student(recipe.teacher, student_checkpoint, teacher_checkpoints),
            train_iters=train_iters,
            eval_interval=recipe.train.eval_interval,
            exports=Exports(output_dir, output.save_interval, output.save_total_limit),
        ).run()
        reporter.message(
            f"checkpoint {exported}\nmetrics    {output_dir / 'metrics.jsonl'}\ncurves     {reporter.plot()}"
        )

"""From a validated recipe to a finished run: build every part, train, clean up."""

from __future__ import annotations

import datetime
import math
import os
from pathlib import Path

import megatron_gkd.runtime.preload  # noqa: F401  isort: skip  (before anything that imports Megatron-Core)

import torch
import torch.distributed as dist

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data import SampleOrder, StepLoader, build_dataset, load_plugins, validation_batches
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.megatron_model import BuildOptions, MegatronModel
from megatron_gkd.models.vocabulary import shared_vocab_size
from megatron_gkd.runtime import portability
from megatron_gkd.runtime.mesh import Layout, Mesh, destroy_mesh, initialize_mesh
from megatron_gkd.teachers.local import LocalTeacher
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.loss import Objective
from megatron_gkd.training.metrics import Reporter
from megatron_gkd.training.student import Student
from megatron_gkd.training.trainer import Trainer

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def train(recipe: Recipe) -> None:
    """Run `recipe` in the world that torchrun describes (one process without it)."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        os.environ.setdefault(name, value)
    portability.select_device(int(os.environ.get("LOCAL_RANK", "0")))
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
    has_teacher = recipe.teacher.kind != "none"
    teacher_checkpoint = Checkpoint.open(recipe.teacher.teacher_model, **shared) if has_teacher else None
    vocab_size = student_checkpoint.vocab_size
    if teacher_checkpoint is not None:
        vocab_size = shared_vocab_size(student_checkpoint, teacher_checkpoint)

    tokenizer = student_checkpoint.tokenizer()
    load_plugins(recipe.data.external_plugins)
    dataset, data_report = build_dataset(recipe.data, "train", tokenizer, **shared)
    order = SampleOrder(
        dataset.sizes, [entry.weight for entry in recipe.data.dataset], recipe.train.seed, recipe.data.shuffle
    )
    train_iters = recipe.train.train_iters or math.ceil(
        recipe.train.num_train_epochs * order.epoch_length / recipe.train.global_batch_size
    )
    batching = {
        "global_batch_size": recipe.train.global_batch_size,
        "micro_batch_size": recipe.train.micro_batch_size,
        "packing": recipe.data.packing,
        "max_length": recipe.data.max_length,
        "dp_rank": mesh.dp.rank(),
        "dp_size": mesh.dp.size(),
        "cp_rank": mesh.cp.rank(),
        "cp_size": mesh.cp.size(),
        "pad_multiple": mesh.layout.pad_multiple,
        "microbatch_multiple": mesh.layout.pipeline if mesh.layout.virtual_pipeline else 1,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    }
    batches = StepLoader(
        dataset, order, **batching, num_workers=recipe.data.dataloader_num_workers, num_steps=train_iters
    )
    validation = None
    if recipe.data.val_dataset:
        held_out, _ = build_dataset(recipe.data, "validation", tokenizer, **shared)
        validation = validation_batches(held_out, **batching, num_batches=recipe.train.eval_iters)

    student, teacher = build_models(recipe, mesh, student_checkpoint, teacher_checkpoint, vocab_size, train_iters)
    output = recipe.output
    with Reporter(
        output_dir,
        train_iters=train_iters,
        log_interval=output.log_interval,
        tensorboard=output.tensorboard,
        is_main=mesh.is_main,
    ) as reporter:
        reporter.message(str(data_report))
        exported = Trainer(
            student,
            teacher,
            batches,
            validation,
            reporter,
            train_iters=train_iters,
            eval_interval=recipe.train.eval_interval,
            exports=Exports(output_dir, output.save_interval, output.save_total_limit),
        ).run()
        reporter.message(f"checkpoint {exported}\nmetrics    {output_dir / 'metrics.jsonl'}\ncurves     {reporter.plot()}")


def build_models(
    recipe: Recipe,
    mesh: Mesh,
    student_checkpoint: Checkpoint,
    teacher_checkpoint: Checkpoint | None,
    vocab_size: int,
    train_iters: int,
) -> tuple[Student, LocalTeacher | None]:
    """The student with its optimizer, and the teacher laid out like it."""
    parallel, distill, section = recipe.parallel, recipe.distill, recipe.train
    dtype = _DTYPES[section.dtype]
    model = MegatronModel.load(
        student_checkpoint,
        mesh,
        BuildOptions(
            dtype=dtype,
            attn=section.attn,
            virtual_pipeline=parallel.virtual_pipeline_model_parallel_size,
            recompute_granularity=parallel.recompute_granularity,
            recompute_method=parallel.recompute_method,
            recompute_num_layers=parallel.recompute_num_layers,
            moe_aux_loss_coeff=section.moe_aux_loss_coeff,
        ),
    )
    teacher = None
    if teacher_checkpoint is not None:
        frozen = MegatronModel.load(teacher_checkpoint, mesh, BuildOptions(dtype=dtype, attn=section.attn))
        head_rows = -(-student_checkpoint.vocab_size // mesh.tp.size())
        teacher = LocalTeacher(frozen, head_rows=head_rows, offload=recipe.teacher.offload_teacher_model)
    objective = Objective(
        mesh,
        vocab_size,
        beta=distill.beta,
        temperature=distill.temperature,
        sft_alpha=distill.sft_alpha,
        chunk_tokens=distill.loss_chunk_tokens,
    )
    return Student(model, objective, parallel, section, train_iters), teacher

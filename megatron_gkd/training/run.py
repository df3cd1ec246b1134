"""A run, from a validated recipe to the final export: prepare, assemble, train, clean up."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megatron_gkd.config.schema import Recipe
from megatron_gkd.data.streams.streamed_rows import StreamedRows
from megatron_gkd.reporting.logging import LOGGER, log_to_file
from megatron_gkd.reporting.reporter import Reporter, open_reporter
from megatron_gkd.runtime.mesh import Mesh
from megatron_gkd.runtime.signals import StopSignals
from megatron_gkd.runtime.time_limit import TimeLimit
from megatron_gkd.training.assemble import AssembledRun, assemble
from megatron_gkd.training.build_teacher import begins_as_student
from megatron_gkd.training.checkpointing.folder import checkpoint_folder
from megatron_gkd.training.checkpointing.identity import recipe_identity
from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
from megatron_gkd.training.checkpointing.saver import Saver
from megatron_gkd.training.completion_recorder import CompletionRecorder
from megatron_gkd.training.exports import Exports
from megatron_gkd.training.interruptions import Interruptions
from megatron_gkd.training.on_policy import Rollouts
from megatron_gkd.training.optimizer_state import adam_name
from megatron_gkd.training.prepare import PreparedRun, prepare
from megatron_gkd.training.run_folder import RunFolder
from megatron_gkd.training.setup import world_of
from megatron_gkd.training.start import Schedule, describe_start
from megatron_gkd.training.trainer import RunOutput, Trainer, TrainerConfig


def train(recipe: Recipe) -> None:
    """Run `recipe` in the world that torchrun describes (one process without it)."""
    rank = int(os.environ.get("RANK", "0"))
    folder = RunFolder(Path(recipe.output.output_dir), is_main=rank == 0)
    with (
        StopSignals(folder.leave) as signals,
        world_of(recipe, folder.record_end) as mesh,
        folder,
        log_to_file(folder.path, rank),
    ):
        run(recipe, mesh, folder, signals)


def run(recipe: Recipe, mesh: Mesh, folder: RunFolder, signals: StopSignals | None = None) -> None:
    """Run `recipe` over `mesh`, into a folder that this run holds. All ranks must call it."""
    prepared = prepare(recipe, mesh)
    parts = assemble(recipe, mesh, prepared)
    rollouts, stream = parts.data.rollouts, parts.data.stream
    point = prepared.point
    last_step = point.step if point is not None and point.is_own else None
    reporter = open_reporter(recipe.output, prepared.train_iters, is_main=mesh.is_main, last_step=last_step)
    with _closing(rollouts), _closing(stream), reporter:
        trainer = build_trainer(recipe, prepared, parts, reporter, signals)
        folder.step = lambda: trainer.state.step
        if point is not None:
            trainer.restore(point.run["progress"], is_own=point.is_own)
            for warning in point.warnings:
                LOGGER.warning(warning)
        for line in prepared.lines:
            if line.remark is not None:
                LOGGER.warning(f"{line.split}: {line.remark}")
        if trainer.config.teacher_is_student and not recipe.distill.sft_alpha and not prepared.has_teacher_prompts:
            LOGGER.warning(
                "teacher: has the weights that the student starts with, and no row has a teacher_prompt: the loss and "
                "its gradient are 0; name another teacher_model"
            )
        schedule = Schedule(prepared.train_iters, prepared.epochs, point)
        adam = adam_name(parts.student.optimizer)
        ends, text_marker = prepared.ends.describe(), prepared.ends.warning()
        if text_marker is not None and rollouts is not None:
            LOGGER.warning(text_marker)
        start = describe_start(recipe, prepared.models, parts.student.model, prepared.lines, schedule, adam, ends)
        reporter.start(start)
        exported = trainer.run()
        if stream is not None and stream.feed is not None:
            LOGGER.info(f"streamed rows of this run: {stream.feed.report().summary()}")
        reporter.end(exported.describe())


def _closing(part: Rollouts | StreamedRows | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if part is None else contextlib.closing(part)


def build_trainer(
    recipe: Recipe, prepared: PreparedRun, parts: AssembledRun, reporter: Reporter, signals: StopSignals | None
) -> Trainer:
    """Build the training loop of a run."""
    section = recipe.train
    saver = Saver(
        checkpoint_folder(recipe),
        is_asynchronous=recipe.output.async_save,
        most=recipe.output.save_total_limit,
    )
    limit = None
    if section.max_runtime is not None:
        limit = TimeLimit(section.max_runtime, longest_save=lambda: saver.longest)
    has_initial_weights = section.init_from is None and (recipe.lora is None or recipe.lora.adapters is None)
    return Trainer(
        TrainerConfig(
            train_iters=prepared.train_iters,
            eval_interval=section.eval_interval,
            max_bad_steps=section.max_bad_steps,
            mismatch_kl_threshold=recipe.rollout.mismatch_kl_threshold,
            completion_ends=prepared.ends.describe(),
            teacher_is_student=has_initial_weights
            and begins_as_student(recipe.teacher, prepared.models.student, prepared.models.teachers),
        ),
        parts.student,
        parts.teacher,
        parts.data,
        RunOutput(
            reporter,
            exports_of(recipe),
            _build_checkpoints(recipe, prepared, parts, saver),
            _build_completions(recipe, prepared, parts),
        ),
        Interruptions(signals, limit),
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


def _build_checkpoints(
    recipe: Recipe, prepared: PreparedRun, parts: AssembledRun, saver: Saver
) -> RunCheckpoints | None:
    if recipe.output.save_interval is None:
        return None
    identity = recipe_identity(recipe) | prepared.identity
    return RunCheckpoints(
        saver,
        parts.saved,
        recipe.output.save_interval,
        identity,
        origin=None if prepared.point is None else prepared.point.origin,
        command="the same command" + (" with --resume auto" if recipe.train.resume == "never" else ""),
    )


def _build_completions(recipe: Recipe, prepared: PreparedRun, parts: AssembledRun) -> CompletionRecorder | None:
    output = recipe.output
    if parts.data.rollouts is None or not output.log_completions:
        return None
    return CompletionRecorder(parts.student.mesh, prepared.models.tokenizer, output.log_completions_interval)

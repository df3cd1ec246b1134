"""The named spans of a step, which a profile shows."""

from __future__ import annotations

import torch
from checkpoints import tiny_checkpoint
from rows import RandomRows
from training_layouts import build, recipe_of, trainer_of

SPANS = {
    "gkd/rollout",
    "gkd/weight_sync",
    "gkd/teacher",
    "gkd/student",
    "gkd/optimizer",
    "gkd/export",
    "gkd/checkpoint",
}


def profile_a_step(rank, world_size, student, teacher, directory):
    """Names of the spans of one on-policy step, an export and a checkpoint."""
    from megatron_gkd.data.batch_config import BatchConfig
    from megatron_gkd.data.lambda_schedule import LambdaSchedule
    from megatron_gkd.data.order import SampleOrder
    from megatron_gkd.rollout.base import Sampling
    from megatron_gkd.rollout.megatron.engine import MegatronEngine
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
    from megatron_gkd.training.on_policy import RolloutOptions, Rollouts
    from megatron_gkd.training.step_prompts import StepPrompts

    apply_workarounds()
    rows = RandomRows(count=24)
    mesh, student, teacher, batches = build(student, teacher, {}, rows)
    prompts = StepPrompts(
        rows,
        SampleOrder(rows.sizes, [1.0], seed=1234, shuffle=True),
        LambdaSchedule(1.0, "step", seed=7),
        BatchConfig.from_recipe(recipe_of({}), mesh, pad_token_id=0),
    )
    options = RolloutOptions(Sampling(max_completion_length=4))
    rollouts = Rollouts(MegatronEngine(student.model, [3]), prompts, options, mesh.dp)
    checkpoints = RunCheckpoints(Saver(CheckpointFolder(directory / "checkpoints")), Saved(student), 1, {})
    trainer, _ = trainer_of(student, teacher, batches, directory, rollouts=rollouts, checkpoints=checkpoints)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        trainer.train_step(1, None)
        is_saved = trainer.save_checkpoint()
        trainer.export(trainer.exports.final())
    destroy_mesh()
    return is_saved, {event.name for event in profile.events() if event.name.startswith("gkd/")}


def test_a_profile_has_all_spans(gloo_world, tmp_path):
    models = [tiny_checkpoint("qwen3", seed=seed, num_hidden_layers=2) for seed in (2, 1)]
    ((is_saved, names),) = gloo_world(1).run(profile_a_step, *models, tmp_path)
    assert is_saved and names == SPANS

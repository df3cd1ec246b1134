"""A signal to any rank, or the time limit, ends the run on all ranks after the same step, and saves it."""

from __future__ import annotations

import os
import signal

import pytest
from checkpoints import tiny_checkpoint
from training_layouts import build, trainer_of

STOPPED = "stopped after step 2 of 3"


def train_until_interrupted(rank, world_size, model, directory, cause, keeps_checkpoints):
    """Interrupt the last rank in step 2 of 3. Returns the error's type, text and exit code."""
    from megatron_gkd.errors import GkdError
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.runtime.signals import StopSignals
    from megatron_gkd.runtime.time_limit import TimeLimit
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds
    from megatron_gkd.training.interruptions import Interruptions

    apply_workarounds()
    _, student, teacher, batches = build(model, model, {"parallel": {"pipeline_model_parallel_size": world_size}})
    checkpoints = None
    if keeps_checkpoints:
        checkpoints = RunCheckpoints(Saver(CheckpointFolder(directory / "checkpoints")), Saved(student), 100, {})
        if cause == "full disk":
            checkpoints.saver.save = lambda *arguments: False
    limit, compute, steps = TimeLimit(1e6), student.compute_gradients, iter(range(1, 9))
    with StopSignals(leave=None) as signals:
        interruptions = Interruptions(signals, limit)
        options = {"checkpoints": checkpoints, "interruptions": interruptions}
        trainer, records = trainer_of(student, teacher, batches, directory, **options)

        def compute_gradients(*arguments, **options):
            if next(steps) == 2 and rank == world_size - 1:
                if cause == "time limit":
                    limit.started -= 1e6
                else:
                    os.kill(os.getpid(), signal.SIGTERM)
            return compute(*arguments, **options)

        student.compute_gradients = compute_gradients
        try:
            trainer.run()
            found = None
        except GkdError as error:
            found = type(error).__name__, str(error), error.exit_code
    destroy_mesh()
    return found, len(records)


def run(gloo_world, directory, cause="signal", keeps_checkpoints=True):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    first, second = gloo_world(2).run(train_until_interrupted, model, directory, cause, keeps_checkpoints)
    assert first == second and first[1] == 2
    return first[0]


@pytest.mark.parametrize(("cause", "reason"), [("signal", "SIGTERM"), ("time limit", "time limit (train.max_runtime)")])
def test_the_run_is_saved_on_all_ranks_and_nothing_is_exported(gloo_world, tmp_path, cause, reason):
    saved = tmp_path / "checkpoints/step-000002"
    text = f"{reason}: {STOPPED}; saved in {saved}; the same command continues the run"
    assert run(gloo_world, tmp_path, cause) == ("Interrupted", text, 75)
    assert (saved / "manifest.json").is_file() and not list(tmp_path.glob("hf*"))


def test_without_checkpoints_the_student_is_exported(gloo_world, tmp_path):
    kind, text, code = run(gloo_world, tmp_path, keeps_checkpoints=False)
    assert (kind, code) == ("Interrupted", 75)
    assert text.endswith(f"(output.save_interval = null); the student is in {tmp_path / 'hf-step-000002'}")
    assert (tmp_path / "hf-step-000002/model.safetensors").is_file()


def test_a_checkpoint_that_can_not_be_saved_makes_it_a_failure(gloo_world, tmp_path):
    kind, text, code = run(gloo_world, tmp_path, "full disk")
    assert (kind, code) == ("RunStopped", 2) and STOPPED in text
    assert "SIGTERM: the checkpoint of step 2 could not be saved" in text
    assert f"The student of step 2 is in {tmp_path / 'hf-step-000002'}" in text

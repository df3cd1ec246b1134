"""A save that fails or hangs on one rank is reported on all of them, and the next one works."""

from __future__ import annotations

import threading

import pytest
import torch
from checkpoints import tiny_checkpoint
from training_layouts import build


def save_with_trouble(rank, world_size, model, directory, trouble):
    """Save step 1, step 2 with trouble on the last rank, and step 2 again. Returns the outcomes and the reports."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.loader import newest_intact
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    apply_workarounds()
    _, student, _, _ = build(model, None, {"teacher": {"kind": "none", "teacher_model": None}})
    saved, reports, gate = Saved(student), [], threading.Event()
    folder = CheckpointFolder(directory)
    run = saved.description() | {"identity": {}, "progress": {"step": 1, "updates": 1}}
    saver = Saver(folder, is_asynchronous=False, report=reports.append, seconds=60.0)
    outcomes = [saver.save(1, saved.to_write(), run)]
    write = FileSystemWriterAsync.write_preloaded_data

    def in_trouble(*arguments):
        if trouble == "raises":
            raise OSError(28, "No space left on device")
        gate.wait(30)
        return write(*arguments)

    if rank == world_size - 1:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(in_trouble)
    saver.seconds = 0.5 if trouble == "hangs" else 60.0
    try:
        outcomes.append(saver.save(2, saved.to_write(), run))
    finally:
        FileSystemWriterAsync.write_preloaded_data = staticmethod(write)
    torch.distributed.barrier()  # the main rank has deleted what it had to
    leftovers = [path.name for path in directory.iterdir() if "unfinished" in path.name]
    steps, saver.seconds = folder.steps(), 60.0
    gate.set()  # what hung writes on, into its own folder
    outcomes.append(saver.save(2, saved.to_write(), run))
    newest, problems = newest_intact(folder)
    destroy_mesh()
    return outcomes, reports, leftovers, steps, newest.name, problems


@pytest.mark.parametrize(
    ("trouble", "why"), [("raises", "No space left on device"), ("hangs", "not written within 0.5 s")]
)
def test_a_save_that_fails_on_one_rank(trouble, why, gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    for outcomes, reports, leftovers, steps, newest, problems in gloo_world(2).run(
        save_with_trouble, model, tmp_path, trouble
    ):
        assert outcomes == [True, False, True] and steps == [1] and leftovers == []
        assert reports[1].startswith("warning: step 2: the checkpoint could not be saved: ") and why in reports[1]
        assert newest == "step-000002" and problems == []


def finish_after_a_kill(rank, world_size, directory):
    """The end of a run that was killed when its last checkpoint was published and older ones were not deleted."""
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.run_checkpoints import RunCheckpoints
    from megatron_gkd.training.checkpointing.saver import Saver

    folder = CheckpointFolder(directory)
    if rank == 0:
        for step in (3, 6, 7):
            folder.prepare(step, {})
            folder.publish(step, {})
    torch.distributed.barrier()
    assert RunCheckpoints(Saver(folder, most=2), saved=None, interval=3, identity={}).finish()
    torch.distributed.barrier()
    return folder.steps()


def test_the_end_of_a_run_deletes_what_a_kill_has_left_of_old_checkpoints(gloo_world, tmp_path):
    assert gloo_world(2).run(finish_after_a_kill, tmp_path) == [[6, 7], [6, 7]]

"""A save that fails or hangs on one rank is reported on all of them, and the next one works."""

from __future__ import annotations

import contextlib
import logging
import resource
import signal
import subprocess
import threading
from unittest import mock

import pytest
import torch
from checkpoints import tiny_checkpoint
from training_layouts import build

SAVED = "megatron_gkd.training.checkpointing"
WRITER = "megatron.core.dist_checkpointing.strategies.filesystem_async.FileSystemWriterAsync"
PHASES = {
    "folder": (f"{SAVED}.folder.CheckpointFolder.prepare", 0),
    "check of the shards": (f"{SAVED}.sharded_write.validate_sharding_integrity", 0),
    "common.pt": (f"{SAVED}.sharded_write.torch.save", 0),
    "local plan": (f"{WRITER}.prepare_local_plan", 1),
    "global plan": (f"{SAVED}.sharded_write.MCoreSavePlanner.create_global_plan", 0),
    "snapshot": (f"{WRITER}.prepare_write_data", 1),
    "shard": (f"{WRITER}.write_preloaded_data", 1),
    ".metadata": (f"{WRITER}.finish", 0),
    "metadata.json": (f"{SAVED}.sharded_write.save_config", 0),
    "manifest.json": (f"{SAVED}.folder.publish", 0),
    "rename": ("pathlib.Path.replace", 0),
}
"""What is made to fail, and on which rank: where only one rank has that work, on this one."""


@contextlib.contextmanager
def student_and_saver(model, directory, **options):
    from megatron_gkd.reporting.logging import LOGGER
    from megatron_gkd.runtime.mesh import destroy_mesh
    from megatron_gkd.training.checkpointing.folder import CheckpointFolder
    from megatron_gkd.training.checkpointing.saver import Saver
    from megatron_gkd.training.checkpointing.state import Saved
    from megatron_gkd.training.checkpointing.workarounds import apply_workarounds

    apply_workarounds()
    _, student, _, _ = build(model, None, {"teacher": {"teacher_kind": "none", "teacher_model": None}})
    saved, reports = Saved(student), []
    saver = Saver(CheckpointFolder(directory), **options)
    run = saved.description() | {"identity": {}, "progress": {"step": 1, "updates": 1}}
    handler = _Lines(reports)
    LOGGER.addHandler(handler)
    LOGGER.setLevel("INFO")
    yield lambda step: saver.save(step, saved.to_write(), run) and saver.finish(), saver, reports
    LOGGER.removeHandler(handler)
    LOGGER.setLevel("NOTSET")
    destroy_mesh()


class _Lines(logging.Handler):
    """Append each record to a list, as text."""

    def __init__(self, lines: list[str]):
        super().__init__()
        self.lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname.lower()}: {record.getMessage()}")


def fail_in_each_phase(rank, world_size, model, directory, is_asynchronous):
    """Save step 1, step 2 with each failure in turn, and step 2 again."""
    from megatron_gkd.training.checkpointing.loader import newest_intact

    with student_and_saver(model, directory, is_asynchronous=is_asynchronous) as (save, saver, reports):
        assert save(1)
        seen = {}
        for phase, (target, failing_rank) in PHASES.items():
            failure = mock.patch(target, side_effect=OSError(28, "No space left on device"))
            with failure if rank == failing_rank else contextlib.nullcontext():
                outcome = save(2)
            torch.distributed.barrier()  # the main rank has deleted what it had to
            seen[phase] = outcome, reports.pop(), sorted(path.name for path in directory.iterdir())
        elsewhere = mock.patch.object(saver, "_unfinished", return_value=directory.with_name("elsewhere"))
        with elsewhere if rank == 1 else contextlib.nullcontext():
            unseen = save(2), reports.pop()
        assert save(2)
        newest, problems = newest_intact(saver.folder)
    return seen, unseen, newest.name, problems


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_a_save_that_fails_in_any_phase_on_one_rank(is_asynchronous, gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    found = gloo_world(2).run(fail_in_each_phase, model, tmp_path / "run", is_asynchronous)
    for seen, (outcome, report), newest, problems in found:
        assert outcome is False and "__1_0.distcp was written by another rank into a folder" in report
        assert seen.keys() == PHASES.keys()
        for phase, (outcome, report, there) in seen.items():
            assert outcome is False, phase
            assert report.startswith("warning: step 2: the checkpoint could not be saved: [Errno 28] No space"), phase
            assert there == ["last", "step-000001"], phase
        assert newest == "step-000002" and problems == []


def fail_beside_the_save(rank, world_size, model, directory):
    """Save three steps where links can't be made, and old checkpoints can't be deleted."""
    with student_and_saver(model, directory, is_asynchronous=False, most=1) as (save, saver, reports):
        refusal = {"side_effect": OSError(1, "Operation not permitted")}
        with mock.patch("os.symlink", **refusal), mock.patch(f"{SAVED}.folder.CheckpointFolder._delete", **refusal):
            outcomes = [save(step) for step in (1, 2, 3)]
    return outcomes, reports, saver.folder.steps()


def test_failures_after_a_save_leave_it_whole(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    ((outcomes, reports, steps),) = gloo_world(1).run(fail_beside_the_save, model, tmp_path)
    assert outcomes == [True, True, True] and steps[-1] == 3
    warnings = [report for report in reports if report.startswith("warning")]
    assert sum("the links best and last can't be kept" in line for line in warnings) == 1
    assert sum("an old checkpoint can't be deleted" in line for line in warnings) == 2 and len(warnings) == 3


def hang(rank, world_size, model, directory):
    """Save step 1, step 2 with a writer that hangs on the last rank, and step 2 again."""
    from megatron_gkd.training.checkpointing.loader import newest_intact

    with student_and_saver(model, directory, is_asynchronous=False) as (save, saver, reports):
        outcomes, gate = [save(1)], threading.Event()
        from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

        write = FileSystemWriterAsync.write_preloaded_data

        def wait(*arguments):
            gate.wait(30)
            return write(*arguments)

        saver.seconds = 0.5
        with mock.patch(f"{WRITER}.write_preloaded_data", wait) if rank == 1 else contextlib.nullcontext():
            outcomes.append(save(2))
        torch.distributed.barrier()
        there, saver.seconds = saver.folder.steps(), 60.0
        gate.set()  # what hung writes on, into its own folder
        outcomes.append(save(2))
        newest, problems = newest_intact(saver.folder)
    return outcomes, reports[1], there, newest.name, problems


def test_a_save_that_hangs_on_one_rank(gloo_world, tmp_path):
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    for outcomes, report, there, newest, problems in gloo_world(2).run(hang, model, tmp_path):
        assert outcomes == [True, False, True] and there == [1]
        assert report.startswith("warning: step 2: the checkpoint could not be saved: not written within 0.5 s")
        assert newest == "step-000002" and problems == []


def fill_the_disk(rank, world_size, model, directory, full):
    """Save step 1, step 2 while the disk is full, and step 2 again."""
    from megatron_gkd.training.checkpointing.loader import newest_intact

    with student_and_saver(model, directory / "run") as (save, saver, reports):
        outcomes = [save(1)]
        with full(rank, directory):
            outcomes.append(save(2))
            torch.distributed.barrier()
        there = sorted(path.name for path in saver.folder.path.iterdir())
        torch.distributed.barrier()
        outcomes.append(save(2))
        newest, problems = newest_intact(saver.folder)
    return outcomes, reports[1], there, newest.name, problems


@contextlib.contextmanager
def filled(rank, directory):
    """A file takes all that the file system has left, but for what a folder and its first files take."""
    filler = directory / "filler"
    if rank == 0:
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        with filler.open("r+b") as file:
            file.truncate(filler.stat().st_size - (1 << 15))
    torch.distributed.barrier()
    yield
    if rank == 0:
        filler.unlink()
    torch.distributed.barrier()


@contextlib.contextmanager
def limited(rank, directory):
    """Where nothing can be mounted: no file may grow beyond a size, which fails as a full disk does (EFBIG)."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


@pytest.mark.parametrize("kind", ["file system", "limit"])
def test_a_disk_that_is_full(kind, gloo_world, tmp_path):
    """A file system of its own needs the right to mount one: without it this is the limit for sizes again."""
    model = tiny_checkpoint("qwen3", seed=2, num_hidden_layers=2)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    is_mounted = kind == "file system" and subprocess.run(mount, capture_output=True).returncode == 0
    full, why = (filled, "No space left on device") if is_mounted else (limited, "File too large")
    try:
        for outcomes, report, there, newest, problems in gloo_world(2).run(fill_the_disk, model, tmp_path, full):
            assert outcomes == [True, False, True]
            assert report.startswith("warning: step 2: the checkpoint could not be saved: ") and why in report
            assert there == ["last", "step-000001"] and newest == "step-000002" and problems == []
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)


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

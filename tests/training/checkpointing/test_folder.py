"""Which checkpoints count, what damage is found, and what is deleted."""

from __future__ import annotations

import json

import pytest

from megatron_gkd.errors import UserError
from megatron_gkd.training.checkpointing.folder import MANIFEST, CheckpointFolder, digest, find_damage, read_run

RUN = {"layout": [1], "with_optimizer": True, "identity": {}, "progress": {"step": 3, "updates": 3}}


@pytest.fixture
def folder(tmp_path):
    return CheckpointFolder(tmp_path / "checkpoints")


def write(folder, step, run=RUN):
    unfinished = folder.prepare(step, run)
    (unfinished / "__0_0.distcp").write_bytes(bytes(range(256)) * 64)
    return folder.publish(step, {path.name: digest(path) for path in unfinished.iterdir()})


def test_only_what_is_published_is_a_checkpoint(folder):
    assert folder.steps() == [] and folder.newest() is None and folder.remove_leftovers() == []
    write(folder, 3)
    newest = write(folder, 12)
    folder.prepare(20, RUN)
    (folder.final(21)).mkdir()
    assert folder.steps() == [3, 12] and folder.newest() == newest
    assert [path.name for path in folder.remove_leftovers()] == ["step-000020.0.unfinished"]
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-000003", "step-000012", "step-000021"]
    assert find_damage(newest) is None and read_run(newest) == RUN


def test_a_step_that_is_saved_again_replaces_the_earlier_one(folder):
    write(folder, 3)
    path = write(folder, 3, RUN | {"layout": [2]})
    assert read_run(path)["layout"] == [2] and find_damage(path) is None


def test_later_steps_are_set_aside(folder):
    """Also one that has lost its manifest, and where an earlier one lies there already."""
    for step in (3, 6, 9):
        write(folder, step)
    assert folder.set_aside_after(9) == []
    assert folder.set_aside_after(6) == [folder.path / "step-000009.1"]
    (write(folder, 9) / MANIFEST).unlink()
    assert folder.set_aside_after(3) == [folder.path / "step-000006.1", folder.path / "step-000009.2"]
    assert folder.published_steps() == folder.steps() == [3]
    assert folder.remove_leftovers() == [] and find_damage(folder.path / "step-000009.1") is None


def test_the_newest_are_kept(folder):
    for step in (9, 10, 11):
        write(folder, step)
    folder.remove_old(2)
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-000010", "step-000011"]


def test_what_was_set_aside_is_deleted_when_the_run_comes_to_its_step_again(folder):
    for step in (3, 6, 9):
        write(folder, step)
    folder.set_aside_after(3)
    write(folder, 6)
    folder.remove_old(5)
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-000003", "step-000006", "step-000009.1"]
    write(folder, 12)
    folder.remove_old(5)
    assert sorted(path.name for path in folder.path.iterdir()) == ["step-000003", "step-000006", "step-000012"]


def flip_one_bit(path):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "damaged: its SHA-256": flip_one_bit,
    "has 100 bytes; it was written with 16384": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_is_named_by_the_rank_whose_share_it_is(message, folder):
    path = write(folder, 3)
    file = path / "__0_0.distcp"
    DAMAGES[message](file)
    assert find_damage(path).startswith(f"{file}: {message}")
    found = [find_damage(path, rank, 2) for rank in range(2)]
    assert sorted(problem is None for problem in found) == [False, True]


def test_each_file_that_is_verified_is_reported(folder):
    path, reported = write(folder, 3), []
    assert find_damage(path, report=lambda: reported.append(None)) is None
    assert len(reported) == len(json.loads((path / "manifest.json").read_text())["files"]) > 1


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"files": 3}'])
def test_an_invalid_manifest(content, folder):
    path = write(folder, 3)
    (path / MANIFEST).write_text(content)
    assert find_damage(path).startswith(f"{path / MANIFEST}: can't be read")
    (path / MANIFEST).unlink()
    assert "so the checkpoint is incomplete" in find_damage(path) and folder.newest() is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read"),
        ("3", "can't be read"),
        ("{}", "lacks layout, with_optimizer, identity, progress"),
        (json.dumps(RUN | {"progress": {"step": 3}}), "lacks progress.updates"),
    ],
)
def test_values_that_can_not_be_read_are_one_line(content, message, folder):
    path = write(folder, 3)
    (path / "run.json").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_run(path)
    assert "\n" not in str(error.value)

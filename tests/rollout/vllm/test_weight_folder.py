"""Versions of the student's weights on disk: complete and as expected, or an error."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from megatron_gkd.errors import UserError
from megatron_gkd.rollout.vllm.weight_folder import WeightFolder, tensor_shapes

SHAPES = {"embed": (5, 3), "norm": (3,), "lm_head.weight": (5, 3)}


def tensors(**changes):
    return {name: torch.randn(shape) for name, shape in (SHAPES | changes).items()}


def folder(tmp_path, optional=()):
    return WeightFolder(tmp_path / "sync", SHAPES, optional)


def test_written_tensors_equal_the_given_ones(tmp_path):
    named = tensors()
    weights = folder(tmp_path).write(named.items(), version=3)
    weights.validate()
    assert weights.version == 3 and weights.directory.is_absolute() and tensor_shapes(weights.directory) == SHAPES
    (file,) = weights.directory.iterdir()
    for name, tensor in load_file(file).items():
        assert torch.equal(tensor, named[name])


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_gkd.rollout.vllm.weight_folder._MAX_FILE_BYTES", 80)
    named = tensors(large=(30,))
    weights = WeightFolder(tmp_path, {**SHAPES, "large": (30,)}).write(named.items(), version=1)
    files = sorted(weights.directory.iterdir())
    assert [list(load_file(file)) for file in files] == [["embed", "norm"], ["lm_head.weight"], ["large"]]
    for file in files:
        assert all(torch.equal(tensor, named[name]) for name, tensor in load_file(file).items())


def test_old_versions_and_unfinished_ones_are_deleted(tmp_path):
    first, later = folder(tmp_path), folder(tmp_path)
    old = [first.write(tensors().items(), version) for version in (1, 2)]
    (tmp_path / "sync" / "weights-000009-dead.unfinished").mkdir()
    (tmp_path / "sync" / "notes").mkdir()
    newest = later.write(tensors().items(), version=2)
    assert newest.directory not in [weights.directory for weights in old], "another run, another folder"
    assert newest.label not in [weights.label for weights in old]
    later.remove_all_but(newest)
    assert sorted(path.name for path in (tmp_path / "sync").iterdir()) == ["notes", newest.directory.name]


@pytest.mark.parametrize(
    ("changes", "without", "message"),
    [
        ({"norm": (4,)}, None, r"norm is \(4,\) and should be \(3,\)"),
        ({"bias": (1,)}, None, r"bias is \(1,\) and should be absent"),
        ({}, "norm", r"norm is missing and should be \(3,\)"),
    ],
)
def test_other_tensors_than_the_checkpoints_are_refused(changes, without, message, tmp_path):
    named = tensors(**changes)
    named.pop(without, None)
    with pytest.raises(UserError, match="not those of the checkpoint it began as: " + message):
        folder(tmp_path).write(named.items(), version=1)


def test_a_tied_head_may_be_missing(tmp_path):
    named = tensors()
    del named["lm_head.weight"]
    assert "lm_head.weight" not in folder(tmp_path, optional=["lm_head.weight"]).write(named.items(), 1).shapes
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        folder(tmp_path).write(named.items(), version=2)


def test_tensors_are_made_to_the_last_even_if_none_can_be_written(tmp_path):
    """The other ranks of a sharded model take part in making each of them."""
    made = []

    def making():
        for name, tensor in tensors().items():
            made.append(name)
            yield name, tensor

    (tmp_path / "sync").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"can't be written to .*sync/weights-000001-"):
        folder(tmp_path).write(making(), version=1)
    assert made == list(SHAPES)


def break_nothing_left(directory):
    (directory / "model-00001.safetensors").unlink()


def break_folder_gone(directory):
    break_nothing_left(directory)
    directory.rmdir()


def break_cut_short(directory):
    file = directory / "model-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_nothing_left, "no .*safetensors file there"),
        (break_folder_gone, "no .*safetensors file there"),
        (break_cut_short, "can't be read"),
    ],
)
def test_a_damaged_folder_is_noticed(damage, message, tmp_path):
    weights = folder(tmp_path).write(tensors().items(), version=1)
    damage(weights.directory)
    with pytest.raises(UserError, match=message):
        weights.validate()

"""Files and folders under their final names."""

import errno
import os
import stat

import pytest

from megatron_gkd.runtime.disk import find_free_path, publish, replace_text


def test_a_file_replaces_the_former_one(tmp_path):
    path = tmp_path / "notes.txt"
    replace_text(path, "first")
    replace_text(path, "second")
    assert path.read_text(encoding="utf-8") == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_moves_with_all_its_files(tmp_path):
    unfinished = tmp_path / "out.unfinished"
    (unfinished / "nested").mkdir(parents=True)
    (unfinished / "nested" / "file").write_text("text")
    publish(unfinished, tmp_path / "out")
    assert (tmp_path / "out" / "nested" / "file").read_text() == "text"
    assert not unfinished.exists()


def test_a_folder_with_content_is_not_replaced(tmp_path):
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        publish(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "file").read_text() == "old"


def test_the_first_free_number_is_found(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf.1").mkdir()
    assert find_free_path(tmp_path / "hf") == tmp_path / "hf.2"


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    replace_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_failed_flush_of_a_file_is_an_error(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        replace_text(tmp_path / "file", "new")
    assert not (tmp_path / "file").exists()

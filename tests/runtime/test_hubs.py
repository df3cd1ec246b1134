"""Models by an id of a hub, with the hubs' libraries replaced: which revision is downloaded, and what is missing."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest
from checkpoints import tiny_checkpoint

from megatron_gkd.config.schema import StudentSection, TeacherSection
from megatron_gkd.errors import RunStopped, UserError
from megatron_gkd.models.checkpoint import Checkpoint
from megatron_gkd.models.location import locate_configuration
from megatron_gkd.runtime.hubs import WANTED, ModelSource

COMMITS = {None: "aaaa", "main": "aaaa", "v1": "bbbb"}


@pytest.fixture
def requests(monkeypatch, tmp_path) -> list[tuple]:
    """The requests to both hubs, which have the model org/name; each commit is a link to a tiny checkpoint."""
    seen: list[tuple] = []

    def snapshot(name, *, revision=None, allow_patterns=None, local_files_only=False):
        assert allow_patterns == WANTED
        seen.append(("hf", name, revision, local_files_only))
        commit = COMMITS.get(revision, revision)
        if name != "org/name" or commit not in COMMITS.values():
            raise OSError(f"404: no revision\n{revision}")
        path = tmp_path / "hf" / "snapshots" / commit
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.symlink_to(tiny_checkpoint("qwen3"))
        return str(path)

    def modelscope_snapshot(name, *, revision=None, allow_patterns=None, local_files_only=False):
        assert allow_patterns == WANTED
        seen.append(("ms", name, revision, local_files_only))
        if name == "org/cached" and not local_files_only:
            raise ConnectionError("no network")
        if name not in ("org/name", "org/cached"):
            raise ValueError("no such model")
        return str(tiny_checkpoint("qwen3"))

    def file(hub):
        def download(name, path, revision=None):
            seen.append((hub, name, path, revision))
            return str(tiny_checkpoint("qwen3") / path)

        return download

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", file("hf"))
    for name in ("modelscope", "modelscope.hub", "modelscope.hub.file_download"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["modelscope"].snapshot_download = modelscope_snapshot
    sys.modules["modelscope.hub.file_download"].model_file_download = file("ms")
    return seen


def test_the_newest_commit_is_pinned_for_all_nodes(requests):
    checkpoint = Checkpoint.open("org/name")
    assert checkpoint.revision == "aaaa" and checkpoint.hub_id == "org/name"
    assert requests[0] == ("hf", "org/name", None, False)
    assert {request[2] for request in requests[1:]} == {"aaaa"}


def test_a_revision_is_downloaded(requests):
    checkpoint = Checkpoint.open(ModelSource("org/name", "v1"))
    assert checkpoint.revision == "bbbb" and checkpoint.path.name == "bbbb"
    assert requests[0] == ("hf", "org/name", "v1", False)


def test_modelscope_has_no_commits_in_its_cache(requests):
    assert Checkpoint.open(ModelSource("org/name", use_hf=False)).revision == "master"
    assert Checkpoint.open(ModelSource("org/name", "v2", use_hf=False)).revision == "v2"
    assert {request[0] for request in requests} == {"ms"} and ("ms", "org/name", "v2", False) in requests


def test_modelscopes_cache_is_used_where_it_cannot_be_reached(requests):
    assert Checkpoint.open(ModelSource("org/cached", use_hf=False)).path == tiny_checkpoint("qwen3")
    assert requests[:2] == [("ms", "org/cached", None, False), ("ms", "org/cached", None, True)]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            ModelSource("org/none"),
            "org/none: neither a local directory nor a hub model that can be downloaded (404",
        ),
        (
            ModelSource("org/name", "v9"),
            "org/name@v9: neither a local directory nor a hub model that can be",
        ),
        (
            ModelSource("org/none", use_hf=False),
            "org/none: neither a local directory nor a model of ModelScope that can be downloaded (no such model)",
        ),
    ],
)
def test_what_there_is_not_is_one_line(source, message, requests):
    with pytest.raises(RunStopped) as error:
        Checkpoint.open(source)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_modelscope_that_is_not_installed_is_one_line(requests, monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope", None)
    message = "org/name: models of ModelScope need its library, which is not installed here"
    with pytest.raises(RunStopped, match=message):
        Checkpoint.open(ModelSource("org/name", use_hf=False))
    with pytest.raises(UserError, match=message):
        locate_configuration(ModelSource("org/name", use_hf=False))


def test_a_directory_has_no_revision(requests):
    path = tiny_checkpoint("qwen3")
    checkpoint = Checkpoint.open(ModelSource(str(path), "v1"))
    assert checkpoint.revision is None and checkpoint.hub_id is None and requests == []


@pytest.mark.parametrize("use_hf", [True, False])
def test_the_configuration_alone_is_of_the_revision(use_hf, requests):
    checkpoint = Checkpoint.open_configuration(ModelSource("org/name", "v1", use_hf))
    assert checkpoint.path == Path(tiny_checkpoint("qwen3"))
    assert requests == [("hf" if use_hf else "ms", "org/name", "config.json", "v1")]


def test_a_teacher_is_of_the_students_hub():
    student = StudentSection(model="org/student", model_revision="v1", use_hf=False)
    teacher = TeacherSection(teacher_model="org/teacher", teacher_model_revision="v2")
    assert ModelSource.of_student(student) == ModelSource("org/student", "v1", use_hf=False)
    assert ModelSource.of_teacher(teacher, "org/teacher", student) == ModelSource("org/teacher", "v2", use_hf=False)


def test_the_libraries_take_these_arguments():
    import huggingface_hub
    import modelscope
    from modelscope.hub.file_download import model_file_download

    for download in (huggingface_hub.snapshot_download, modelscope.snapshot_download):
        assert {"revision", "allow_patterns", "local_files_only"} <= set(inspect.signature(download).parameters)
    for download in (huggingface_hub.hf_hub_download, model_file_download):
        inspect.signature(download).bind("org/name", "config.json", revision="v1")

"""Revisions of models, and ModelScope in place of Hugging Face's hub."""

import importlib.util

import pytest

SELF = ["--teacher_kind", "self", "--teacher_model", "student", "--offload_teacher_model", "false"]
SERVER = [
    "--offload_teacher_model",
    "false",
    "--teacher_model",
    "null",
    "--teacher_model_server",
    "http://a:1",
    "--gkd_logits_topk",
    "8",
]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--model_revision", "v1"],
            "student.model_revision = v1: only with an id of a hub; student.model = student is a folder, whose files "
            "are used as they are",
        ),
        (
            ["--teacher_model_revision", "v1"],
            "teacher.teacher_model_revision = v1: only with an id of a hub; teacher.teacher_model = teacher is a "
            "folder, whose files are used as they are",
        ),
        (
            [*SERVER, "--teacher_model_revision", "v1"],
            "teacher.teacher_model_revision = v1: only with teacher.teacher_kind = local",
        ),
        (
            [*SELF, "--teacher_model_revision", "v1"],
            "teacher.teacher_model_revision = v1: only with teacher.teacher_kind = local; that of the student is "
            "student.model_revision",
        ),
    ],
)
def test_a_revision_without_an_effect_is_refused(arguments, problem, workspace):
    assert workspace.problems(*arguments) == [problem]


def test_revisions_of_a_hub_are_accepted(workspace):
    models = ["--model", "org/student", "--teacher_model", "org/teacher"]
    assert workspace.problems(*models, "--model_revision", "v1", "--teacher_model_revision", "v2") == []


def test_modelscope_needs_its_library(workspace, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "modelscope" else real(name))
    assert workspace.problems("--use_hf", "false") == [], "all models are folders"
    for arguments in (["--model", "org/name"], ["--teacher_model", "org/name"]):
        assert workspace.problems("--use_hf", "false", *arguments) == [
            "student.use_hf = false: org/name is a model of ModelScope, whose library is not installed here (pip "
            "install modelscope); or set it to true"
        ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "modelscope" else real(name))
    assert workspace.problems("--use_hf", "false", "--model", "org/name") == []

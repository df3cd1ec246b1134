import json

import pytest


@pytest.fixture
def export(workspace):
    """`export(name)`: a model in the output_dir of the recipe, as an earlier run leaves it."""

    def of(name):
        folder = workspace.folder / "runs/x" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_bytes((workspace.folder / "student/config.json").read_bytes())
        return f"runs/x/{name}"

    return of


@pytest.mark.parametrize("key", ["student.model", "teacher.teacher_model"])
@pytest.mark.parametrize("name", ["hf", "hf-step-000010"])
def test_a_model_in_the_place_of_an_export_is_refused(key, name, workspace, export):
    model = export(name)
    assert workspace.problems(f"--{key}", model) == [
        f"output.output_dir = runs/x: {key} = {model} is an export in it; must be another folder"
    ]
    assert workspace.problems(f"--{key}", model, "--output_dir", "runs/y") == []


def test_links_are_followed_both_ways(workspace, export):
    (workspace.folder / "link").symlink_to(workspace.folder / export("hf"))
    (problem,) = workspace.problems("--model", "link")
    assert problem.startswith("output.output_dir = runs/x: student.model = link is an export in it")
    (workspace.folder / "runs/y").mkdir()
    (workspace.folder / "runs/y/hf").symlink_to(workspace.folder / "student")
    (problem,) = workspace.problems("--output_dir", "runs/y")
    assert problem.startswith("output.output_dir = runs/y: student.model = student is an export in it")


def test_rows_within_an_export_are_refused(workspace, export):
    path = export("hf") + "/rows.jsonl"
    (workspace.folder / path).write_text("{}\n")
    (problem,) = workspace.problems("--dataset", json.dumps([path]))
    assert problem == f"output.output_dir = runs/x: data.dataset = {path} is an export in it; must be another folder"


@pytest.mark.parametrize("name", ["base", "hf.1", "hf-step-000010.1"])
def test_other_folders_in_output_dir_are_no_exports_of_this_run(name, workspace, export):
    assert workspace.problems("--model", export(name)) == []


@pytest.mark.parametrize("name", ["adapters", "adapters-step-000010"])
def test_adapters_in_the_place_of_an_export_are_refused(name, workspace):
    path = f"runs/x/{name}"
    (workspace.folder / path).mkdir(parents=True)
    problem = f"output.output_dir = runs/x: lora.adapters = {path} is an export in it; must be another folder"
    assert problem in workspace.problems("--adapters", path)
    assert problem not in workspace.problems("--adapters", path, "--output_dir", "runs/y")

"""Which keys of a teacher go together, one line a mistake."""

import pytest

TWO = "[{tags: [a], teacher_model: teacher}, {tags: [b, c], teacher_model: teacher}]"
KEY = ["--teacher_tag_key", "subject"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--kind", "server"], "teacher.teacher_model_server = []: must name a server where teacher.kind = server"),
        (
            ["--kind", "local", "--teacher_model_server", "http://host:8000"],
            "teacher.teacher_model_server = ['http://host:8000']: only with teacher.kind = server",
        ),
        (
            ["--teacher_model", "null", "--teacher_model_server", "host:8000"],
            "teacher.teacher_model_server = host:8000: must be",
        ),
        (KEY, "teacher.teacher_tag_key = subject: only with teachers"),
        (
            ["--teacher_model", "null", "--teachers", TWO],
            "teacher.teacher_tag_key = null: must name the rows' key that holds a teacher's tag, with teachers",
        ),
        (
            ["--teachers", TWO, *KEY, "--teacher_model", "teacher"],
            "teacher.teacher_model = teacher: not beside teachers, which have their own",
        ),
        (
            ["--teacher_model", "null", "--teachers", TWO.replace("[b, c]", "[c, a]"), *KEY],
            "teacher.teachers[1].tags = ['c', 'a']: a is a tag of teacher.teachers[0] already",
        ),
        (
            ["--teacher_model", "null", "--teachers", "[{tags: [a], kind: none}]", *KEY],
            "teacher.teachers[0].kind = none: must be local, server or self",
        ),
        (
            ["--teacher_model", "null", "--teachers", "[{tags: [a], teacher_model: ./no}]", *KEY],
            "teacher.teachers[0].teacher_model = ./no: must be a Hugging Face folder",
        ),
    ],
)
def test_refused(workspace, arguments, problem):
    found = workspace.problems("--offload_teacher_model", "false", *arguments, world_size=2)
    assert [line for line in found if line.startswith(problem)], found


def test_several_teachers_pass(workspace):
    arguments = ["--offload_teacher_model", "false", "--teacher_model", "null", "--teachers", TWO, *KEY]
    assert workspace.problems(*arguments, world_size=2) == []

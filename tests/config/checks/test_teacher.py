"""Which keys of a teacher go together, one line a mistake."""

import pytest
from recipe_workspace import DENSE

SERVER = ["--offload_teacher_model", "false", "--teacher_model", "null", "--teacher_model_server", "[http://host:8000]"]
TWO = "[{tags: [a], teacher_model: teacher}, {tags: [b, c], teacher_model: teacher}]"
KEY = ["--teacher_tag_key", "subject"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["--teacher_kind", "server"],
            "teacher.teacher_model_server = []: must name a server where teacher.teacher_kind = server",
        ),
        (
            ["--teacher_kind", "local", "--teacher_model_server", "http://host:8000"],
            "teacher.teacher_model_server = ['http://host:8000']: only with teacher.teacher_kind = server",
        ),
        (
            ["--teacher_model", "null", "--teacher_model_server", "host:8000"],
            "teacher.teacher_model_server = host:8000: must be",
        ),
        (
            [*SERVER, "--teacher_model", "teacher"],
            "teacher.teacher_model = teacher: not with teacher.teacher_model_server",
        ),
        (
            [*SERVER, "--teacher_model_server", "[http://a:1, http://b:1, http://a:1]"],
            "teacher.teacher_model_server = ['http://a:1', 'http://b:1', 'http://a:1']: must name every server once",
        ),
        (SERVER, "distill.gkd_logits_topk = null: must be set with teacher.teacher_model_server"),
        (
            [*SERVER, "--gkd_logits_topk", "8", "--gkd_topk_tail", "bucket"],
            "distill.temperature = 0.9: must be 1 with gkd_topk_tail = bucket and teacher.teacher_model_server",
        ),
        ([*SERVER, "--teacher_server_concurrency", "0"], "teacher.teacher_server_concurrency = 0: must be"),
        (
            ["--teacher_kind", "self"],
            "teacher.teacher_model = teacher: must be student.model (student), for its initial weights",
        ),
        (
            ["--teacher_kind", "self", "--teacher_model", "student", "--teacher_ema", "0.9"],
            "teacher.teacher_ema = 0.9: only without teacher.teacher_model",
        ),
        (["--teacher_ema", "0.9"], "teacher.teacher_ema = 0.9: only with teacher.teacher_kind = self"),
        (
            ["--teacher_kind", "self", "--teacher_model", "null", "--offload_teacher_model", "true"],
            "teacher.offload_teacher_model = true: must be false where teacher.teacher_kind = self",
        ),
        (
            ["--teacher_max_length", "5000"],
            "data.teacher_max_length = 5000: must be <= the 4096 positions of teacher.teacher_model (teacher)",
        ),
        (
            ["--teacher_kind", "self", "--teacher_model", "null", "--teacher_max_length", "5000"],
            "data.teacher_max_length = 5000: must be <= the 4096 positions of student.model (student)",
        ),
        (
            ["--teacher_kind", "self", "--teacher_model", "null", "--teacher_adapters", "a"],
            "teacher.teacher_adapters = a: only with teacher.teacher_kind = local",
        ),
        (
            ["--teacher_adapters", "a"],
            "teacher.teacher_adapters = a: must be a folder of PEFT adapters; there is no adapter_config.json in it",
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
            ["--teacher_model", "null", "--teachers", "[{tags: [a], teacher_kind: none}]", *KEY],
            "teacher.teachers[0].teacher_kind = none: must be local, server or self",
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


def test_several_teachers_are_accepted(workspace):
    arguments = ["--offload_teacher_model", "false", "--teacher_model", "null", "--teachers", TWO, *KEY]
    assert workspace.problems(*arguments, world_size=2) == []


@pytest.mark.parametrize("tail", [["renormalize", "--temperature", "0.9"], ["bucket", "--temperature", "1"]])
def test_a_server_that_gives_enough_is_accepted(workspace, tail):
    assert workspace.problems(*SERVER, "--gkd_logits_topk", "8", "--gkd_topk_tail", *tail) == []


@pytest.mark.parametrize("keys", [["null"], ["./student"], ["null", "--teacher_ema", "0.99"]])
def test_the_student_as_its_own_teacher_is_accepted(workspace, keys):
    arguments = ["--teacher_kind", "self", "--offload_teacher_model", "false", "--teacher_model", *keys]
    assert workspace.problems(*arguments, world_size=2) == []


def test_what_only_the_teacher_reads_may_be_longer_than_the_student_can(workspace):
    workspace.model("student", {**DENSE, "max_position_embeddings": 512})
    assert workspace.problems("--teacher_max_length", "4096") == []
